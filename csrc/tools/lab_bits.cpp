#include <torch/script.h>

#include <array>
#include <cstdio>
#include <memory>

#include "tools/lab_common.h"
#include "tools/progress.h"

namespace gptq::tools {
namespace {

constexpr std::array kGranularities{"tensor", "row", "group"};

// Where some channels are larger than the others.
struct Outliers {
  const char* name;
  double weight;  ///< factor on those columns of the weight
  double input;   ///< factor on those channels of the inputs
};

struct BitsStudy {
  Study study{"bits"};
  WeightFlags shape{1024, 1024};
  QuantizerFlags quantizer;
  InputFlags correlation;
  std::vector<int64_t> bits{2, 3, 4, 8};
  int64_t group_size = 128;
  int64_t samples = 4096;
  int64_t outlier_columns = 8;
  double outlier_weight = 10;
  double outlier_input = 10;

  void run();

 private:
  QuantizeOptions options(int64_t bits, const std::string& granularity) const;
  Json run_case(const Outliers& outliers, Progress& progress, size_t& done) const;
};

QuantizeOptions BitsStudy::options(int64_t bits, const std::string& granularity) const {
  QuantizeOptions options = quantizer.options(bits, granularity == "group" ? group_size : -1);
  options.per_tensor = granularity == "tensor";
  return options;
}

Json BitsStudy::run_case(const Outliers& outliers, Progress& progress, size_t& done) const {
  const at::Tensor columns = at::randperm(shape.columns, study.generator(2)).narrow(0, 0, outlier_columns);
  const auto scaled = [&](double factor) { return at::ones({shape.columns}).index_fill_(0, columns, factor); };
  const at::Tensor weight = shape.draw(study.generator()).mul_(scaled(outliers.weight));
  Inputs source = correlation.correlated(shape.columns, study.generator(1));
  source.scale_channels(scaled(outliers.input));
  const at::Tensor hessian = source.hessian(samples, study.generator(3));
  const Yardstick yardstick(weight, source.covariance());
  Json result{{"outliers", outliers.name}, {"rows", Json::array()}};
  for (const int64_t width : bits) {
    for (const char* granularity : kGranularities) {
      const QuantizeOptions used = options(width, granularity);
      result["rows"].push_back({{"bits", width},
                                {"granularity", granularity},
                                {"effective_bits", effective_bits(shape.rows, shape.columns, used)},
                                {"rtn", yardstick.rounded(hessian, used).json()},
                                {"gptq", yardstick.quantized(hessian, used).json()}});
      progress.update(++done, 3 * bits.size() * kGranularities.size(),
                      std::to_string(width) + " bits per " + granularity + ", outliers: " + outliers.name);
    }
  }
  return result;
}

void BitsStudy::run() {
  TORCH_CHECK(outlier_columns <= shape.columns, "--outlier-columns: must be at most the ", shape.columns,
              " columns, got ", outlier_columns);
  study.begin();
  Json results;
  results["cases"] = Json::array();
  {
    Progress progress("bits");
    size_t done = 0;
    for (const Outliers& outliers :
         {Outliers{"none", 1, 1}, Outliers{"weight", outlier_weight, 1}, Outliers{"input", 1, outlier_input}}) {
      results["cases"].push_back(run_case(outliers, progress, done));
    }
  }
  study.finish(results);
  std::printf("%-8s %4s %-7s %9s %12s %12s %8s\n", "outliers", "bits", "per", "effective", "RTN error", "GPTQ error",
              "ratio");
  for (const Json& result : results["cases"]) {
    for (const Json& row : result["rows"]) {
      const double rtn = row["rtn"]["relative_error"], gptq = row["gptq"]["relative_error"];
      std::printf("%-8s %4lld %-7s %9.4f %11.4f%% %11.4f%% %8.3f\n", result["outliers"].get<std::string>().c_str(),
                  static_cast<long long>(row["bits"].get<int64_t>()), row["granularity"].get<std::string>().c_str(),
                  row["effective_bits"].get<double>(), 100 * rtn, 100 * gptq, gptq / rtn);
    }
  }
}

}  // namespace

void add_bits_study(CLI::App& lab) {
  const auto command = std::make_shared<BitsStudy>();
  BitsStudy& widths = *command;
  CLI::App* sub = lab.add_subcommand("bits", "Bits per weight, per tensor, row or group, with and without outliers");
  widths.study.add_to(*sub);
  widths.shape.add_to(*sub, widths.study);
  widths.study.setting(*sub, "bits", widths.bits, "Bits per weight")->delimiter(',')->check(CLI::Range(2, 8));
  widths.study.setting(*sub, "group-size", widths.group_size, "Inputs that share a scale, where a group has one")
      ->check(CLI::PositiveNumber);
  widths.quantizer.add_to(*sub, widths.study);
  widths.study.setting(*sub, "samples", widths.samples, "Inputs to calibrate on")->check(CLI::PositiveNumber);
  widths.correlation.add_to(*sub, widths.study);
  widths.study.setting(*sub, "outlier-columns", widths.outlier_columns, "Channels that are outliers")
      ->check(CLI::NonNegativeNumber);
  widths.study.setting(*sub, "outlier-weight", widths.outlier_weight, "How much larger their weights are")
      ->check(CLI::PositiveNumber);
  widths.study.setting(*sub, "outlier-input", widths.outlier_input, "How much larger their inputs are")
      ->check(CLI::PositiveNumber);
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
