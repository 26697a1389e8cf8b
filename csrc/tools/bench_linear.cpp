#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <gptq/linear_w4.h>
#include <gptq/pack_w4.h>
#include <gptq/quantize_weight.h>

#include <atomic>
#include <cmath>

#include "tools/bench_common.h"
#include "tools/commands.h"

namespace gptq::tools {
namespace {

constexpr double kLeastSeconds = 2e-4;  // of a contender in one round
constexpr int64_t kCheckedRows = 16;    // rows that are compared with float64

/// Weights of one shape, quantized and dense. A call takes the next copy, so that enough of them never meet a cache.
struct Weights {
  std::vector<at::Tensor> packed, dense, half;
  at::Tensor scales;
  at::Tensor values;  ///< f64 [N, K]: what the packed ones stand for
  int64_t group_size;
  size_t next = 0;

  Weights(int64_t k, int64_t n, int64_t group, int64_t copies, at::Generator& generator) : group_size(group) {
    QuantizeOptions options;
    options.mode = "rtn";
    options.scale_search = "minmax";
    options.group_size = group;
    const QuantizeResult result = quantize_weight(at::randn({n, k}, generator) * 0.02, at::Tensor(), options);
    scales = result.scales;
    const at::Tensor codes = pack_w4(result.codes), floats = result.dequantize();
    values = floats.to(at::kDouble);
    for (int64_t copy = 0; copy < copies; ++copy) {
      packed.push_back(codes.clone());
      dense.push_back(floats.clone());
      half.push_back(floats.to(at::kBFloat16));
    }
  }

  at::Tensor times(const at::Tensor& x, const char* compute) {
    return linear_w4(x, packed[next++ % packed.size()], scales, {}, {}, {}, group_size, compute);
  }
  at::Tensor times_dense(const at::Tensor& x) {
    return at::linear(x, x.scalar_type() == at::kFloat ? dense[next++ % dense.size()] : half[next++ % half.size()]);
  }
};

/// Reads every byte once.
uint64_t read_all(const at::Tensor& bytes) {
  const auto* words = reinterpret_cast<const uint64_t*>(bytes.const_data_ptr<uint8_t>());
  std::atomic<uint64_t> total = 0;
  at::parallel_for(0, bytes.numel() / 64, 1 << 12, [&](int64_t begin, int64_t end) {
    uint64_t sums[32] = {};
    int64_t i = 8 * begin;
    for (; i + 32 <= 8 * end; i += 32) {
      for (int64_t lane = 0; lane < 32; ++lane) {
        sums[lane] += words[i + lane];
      }
    }
    for (; i < 8 * end; ++i) {
      sums[0] += words[i];
    }
    for (const uint64_t sum : sums) {
      total += sum;
    }
  });
  return total;
}

double relative_error(const at::Tensor& y, const at::Tensor& exact) {
  return (y.to(at::kDouble) - exact).norm().item<double>() / exact.norm().item<double>();
}

struct BenchLinear {
  std::vector<std::string> shapes{"768x2304", "768x768", "768x3072", "3072x768", "4096x4096", "4096x14336"};
  std::vector<int64_t> tokens{1, 4, 16, 64, 256};
  std::string regime = "hot";
  double dram_megabytes = 512;
  BenchSettings settings{30};

  void run();

 private:
  Json measure(Weights& weights, int64_t m, at::Generator& generator) const;
};

Json errors_json(Weights& weights, const at::Tensor& x, const at::Tensor& half) {
  const at::Tensor few = x.slice(0, 0, kCheckedRows), few_half = half.slice(0, 0, kCheckedRows);
  const at::Tensor exact = few.to(at::kDouble).mm(weights.values.t()),
                   exact_half = few_half.to(at::kDouble).mm(weights.values.t());
  return {{"exact", relative_error(weights.times(few, "exact"), exact)},
          {"int8", relative_error(weights.times(few, "int8"), exact)},
          {"torch", relative_error(weights.times_dense(few), exact)},
          {"exact bf16", relative_error(weights.times(few_half, "exact"), exact_half)},
          {"torch bf16", relative_error(weights.times_dense(few_half), exact_half)}};
}

Json BenchLinear::measure(Weights& weights, int64_t m, at::Generator& generator) const {
  const int64_t n = weights.values.size(0), k = weights.values.size(1);
  const at::Tensor x = at::randn({m, k}, generator), half = x.to(at::kBFloat16);
  const Times times = interleave({{"exact", [&] { weights.times(x, "exact"); }},
                                  {"int8", [&] { weights.times(x, "int8"); }},
                                  {"torch", [&] { weights.times_dense(x); }},
                                  {"exact bf16", [&] { weights.times(half, "exact"); }},
                                  {"torch bf16", [&] { weights.times_dense(half); }},
                                  {"read", [&] { read_all(weights.packed[weights.next++ % weights.packed.size()]); }}},
                                 settings.rounds, kLeastSeconds);
  Json speedup;
  for (const auto& [name, peer] : {std::pair{"exact", "torch"}, {"int8", "torch"}, {"exact bf16", "torch bf16"}}) {
    speedup[name] = spread(speedups(times, name, peer));
  }
  const double bytes = static_cast<double>(weights.packed[0].numel());
  const std::vector<double> share = speedups(times, "exact", "read");
  const double operations = 2.0 * static_cast<double>(m * n * k) / median(times.at("exact"));
  std::printf(
      "%5lld x %-5lld M %-5lld  exact %9.1f us  %5.2fx torch   int8 %5.2fx   bf16 %5.2fx torch bf16   %3.0f%% of "
      "reading "
      "at %.0f GB/s   %.0f GOP/s\n",
      static_cast<long long>(k), static_cast<long long>(n), static_cast<long long>(m), 1e6 * median(times.at("exact")),
      speedup["exact"]["median"].get<double>(), speedup["int8"]["median"].get<double>(),
      speedup["exact bf16"]["median"].get<double>(), 100 * median(share), bytes / median(times.at("read")) / kGiga,
      operations / kGiga);
  std::fflush(stdout);
  return {{"k", k},
          {"n", n},
          {"m", m},
          {"seconds", seconds_json(times)},
          {"speedup", speedup},
          {"share_of_reading", spread(share)},
          {"read_gb_per_second", bytes / median(times.at("read")) / kGiga},
          {"error", errors_json(weights, x, half)}};
}

void BenchLinear::run() {
  settings.set_threads();
  JsonOutput output(settings.json);
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(42);
  Json results = Json::array();
  for (const std::string& shape : shapes) {
    const auto [k, n] = parse_shape(shape, "--shapes", "KxN");
    const double copies = regime == "dram" ? std::ceil(dram_megabytes * 2e6 / static_cast<double>(k * n)) : 1;
    Weights weights(k, n, settings.group_size, static_cast<int64_t>(copies), generator);
    for (const int64_t m : tokens) {
      results.push_back(measure(weights, m, generator));
    }
  }
  Json report = settings.describe();
  report["regime"] = regime;
  report["results"] = results;
  output.write(report);
}

}  // namespace

void add_bench_linear_command(CLI::App& app) {
  const auto bench = std::make_shared<BenchLinear>();
  CLI::App* sub = app.add_subcommand("linear", "gptq::linear_w4 beside dense linears of torch");
  sub->add_option("--shapes", bench->shapes, "KxN, inputs and outputs of each linear")
      ->capture_default_str()
      ->delimiter(',');
  sub->add_option("--tokens", bench->tokens, "Rows of the input, M")
      ->capture_default_str()
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20));
  sub->add_option("--regime", bench->regime,
                  "hot: the same weight again and again; dram: copies in turn, beyond any cache")
      ->capture_default_str()
      ->check(CLI::IsMember({"hot", "dram"}));
  sub->add_option("--dram-megabytes", bench->dram_megabytes, "Packed bytes that the copies take in regime dram")
      ->capture_default_str()
      ->check(CLI::Range(1.0, 1e6));
  bench->settings.add_to(*sub);
  sub->callback([bench] { bench->run(); });
}

}  // namespace gptq::tools
