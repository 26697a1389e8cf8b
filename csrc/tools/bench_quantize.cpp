#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gptq/gptq_layer.h>

#include <cmath>

#include "tools/bench_common.h"
#include "tools/commands.h"
#include "tools/progress.h"
#include "tools/published_gptq.h"
#include "tools/report.h"

namespace gptq::tools {
namespace {

constexpr int64_t kTokens = 2048;    // of a batch that is added to a Hessian
constexpr int64_t kPeakSide = 2048;  // of the product whose speed counts as the machine's peak

struct Shape {
  int64_t n, k;
};

/// How many times faster than the published steps each of the others is.
Json ratios(const Times& times) {
  Json json;
  for (const auto& [name, seconds] : times) {
    if (name != "published") {
      json[name] = spread(speedups(times, name, "published"));
    }
  }
  return json;
}

struct BenchQuantize {
  std::vector<std::string> shapes{"768x768", "3072x768", "768x3072", "4096x4096"};
  BenchSettings settings{5};

  void run();

 private:
  Json measure(const Shape& shape) const;
};

/// Inputs whose channels are correlated, as those of a language model are.
at::Tensor correlated_inputs(int64_t k, at::Generator& generator) {
  const at::Tensor mixing = at::eye(k) + at::randn({k, k}, generator) / std::sqrt(static_cast<double>(k));
  return at::randn({kTokens, k}, generator).mm(mixing);
}

Json BenchQuantize::measure(const Shape& shape) const {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(42);
  const at::Tensor weight = at::randn({shape.n, shape.k}, generator) * 0.02;
  GPTQLayer layer(weight);
  at::Tensor inputs;
  for (int64_t tokens = 0; tokens < 2 * shape.k; tokens += kTokens) {
    inputs = correlated_inputs(shape.k, generator);
    layer.add_batch(inputs);
  }
  const at::Tensor hessian = layer.hessian();
  QuantizeOptions sweep_alone;
  sweep_alone.group_size = settings.group_size;
  sweep_alone.scale_search = "minmax";
  sweep_alone.refine_sweeps = 0;
  sweep_alone.row_guard = false;
  sweep_alone.compare = false;
  QuantizeOptions classic = sweep_alone, refined = sweep_alone, all;
  classic.mode = "classic";
  refined.scale_search = "weighted";
  refined.refine_sweeps = 1;
  all.group_size = settings.group_size;

  at::Tensor square = at::randn({kPeakSide, kPeakSide}, generator), published_hessian = at::zeros_like(hessian);
  int64_t published_samples = 0;
  const Times quantize =
      interleave({{"published", [&] { published_gptq(weight, hessian, 4, settings.group_size, 0.01); }},
                  {"sweep", [&] { quantize_weight(weight, hessian, sweep_alone); }},
                  {"classic", [&] { quantize_weight(weight, hessian, classic); }},
                  {"refined", [&] { quantize_weight(weight, hessian, refined); }},
                  {"default", [&] { quantize_weight(weight, hessian, all); }},
                  {"peak", [&] { square.mm(square); }}},
                 settings.rounds);
  const Times add_batch = interleave(
      {{"published", [&] { published_samples = published_add_batch(published_hessian, inputs, published_samples); }},
       {"add_batch", [&] { layer.add_batch(inputs); }}},
      settings.rounds);

  const auto n = static_cast<double>(shape.n), k = static_cast<double>(shape.k), side = static_cast<double>(kPeakSide);
  const double flops = k * k * k / 3 + n * k * k;
  const double hessian_flops = static_cast<double>(kTokens) * k * (k + 1);  // of one triangle
  Json result{{"shape", {shape.n, shape.k}},
              {"seconds", seconds_json(quantize)},
              {"speedup", ratios(quantize)},
              {"hessian_seconds", seconds_json(add_batch)},
              {"hessian_speedup", ratios(add_batch)["add_batch"]},
              {"hessian_gflops", hessian_flops / median(add_batch.at("add_batch")) / kGiga},
              {"sweep_gflops", flops / median(quantize.at("sweep")) / kGiga},
              {"peak_gflops", 2 * side * side * side / median(quantize.at("peak")) / kGiga}};
  result["speedup"].erase("peak");
  const auto ratio = [&](const char* name) { return result["speedup"][name]["median"].get<double>(); };
  std::printf(
      "%5lld x %-5lld  published %8.1f ms   sweep %5.1fx   classic %5.1fx   refined %5.1fx   default %5.1fx   "
      "Hessian %4.1fx   "
      "GFLOP/s: sweep %.0f, Hessian %.0f, GEMM %.0f\n",
      static_cast<long long>(shape.n), static_cast<long long>(shape.k), 1e3 * median(quantize.at("published")),
      ratio("sweep"), ratio("classic"), ratio("refined"), ratio("default"),
      result["hessian_speedup"]["median"].get<double>(), result["sweep_gflops"].get<double>(),
      result["hessian_gflops"].get<double>(), result["peak_gflops"].get<double>());
  std::fflush(stdout);
  return result;
}

void BenchQuantize::run() {
  std::vector<Shape> parsed;
  parsed.reserve(shapes.size());
  for (const std::string& shape : shapes) {
    const auto [n, k] = parse_shape(shape, "--shapes", "NxK");
    parsed.push_back({n, k});
  }
  settings.set_threads();
  JsonOutput output(settings.json);
  Json results = Json::array();
  for (const Shape& shape : parsed) {
    results.push_back(measure(shape));
  }
  Json report = settings.describe();
  report["tokens_per_batch"] = kTokens;
  report["shapes"] = results;
  output.write(report);
}

}  // namespace

void add_bench_quantize_command(CLI::App& app) {
  const auto bench = std::make_shared<BenchQuantize>();
  CLI::App* sub = app.add_subcommand(
      "quantize",
      "Quantizing one weight, and updating its Hessian, beside the published algorithm in torch operations");
  sub->add_option("--shapes", bench->shapes, "NxK of each weight")->capture_default_str()->delimiter(',');
  bench->settings.add_to(*sub);
  sub->callback([bench] { bench->run(); });
}

}  // namespace gptq::tools
