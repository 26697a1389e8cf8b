#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

#include "tools/lab_common.h"
#include "tools/progress.h"

namespace gptq::tools {
namespace {

// Over draws; the standard deviation is that of a sample, 0 for a single draw.
Json spread(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  double mean = 0, squares = 0;
  for (const double value : values) {
    mean += value / n;
  }
  for (const double value : values) {
    squares += (value - mean) * (value - mean);
  }
  return {{"mean", mean},
          {"std", values.size() > 1 ? std::sqrt(squares / (n - 1)) : 0.0},
          {"min", *std::min_element(values.begin(), values.end())},
          {"max", *std::max_element(values.begin(), values.end())}};
}

// A calibration source, and what the deployed layer sees.
struct Case {
  const char* name;
  const Inputs& calibration;
  const Inputs& deployed;
};

struct CalibrationStudy {
  Study study{"calibration"};
  WeightFlags shape{512, 512};
  QuantizerFlags quantizer;
  InputFlags correlation;
  std::vector<int64_t> sample_counts{10, 25, 50, 100, 200, 500, 1000};
  int64_t draws = 5;
  int64_t heldout_samples = 16384;
  int64_t group_size = 128;
  int64_t bits = 4;

  void run();

 private:
  Json run_case(const Case& what, const at::Tensor& weight, Progress& progress, size_t& done) const;
};

Json CalibrationStudy::run_case(const Case& what, const at::Tensor& weight, Progress& progress, size_t& done) const {
  const QuantizeOptions options = quantizer.options(bits, group_size);
  const Yardstick yardstick(weight, what.deployed.hessian(heldout_samples, study.generator(3)));
  const Distance rtn = yardstick.rounded({}, options);
  Json result{{"case", what.name}, {"rtn", {{"mse", rtn.mse}, {"heldout_loss", rtn.heldout_loss}}}};
  result["points"] = Json::array();
  for (size_t i = 0; i < sample_counts.size(); ++i) {
    std::vector<double> mse, loss;
    for (int64_t draw = 0; draw < draws; ++draw) {
      const at::Generator generator = study.generator(16 + i * static_cast<size_t>(draws) + static_cast<size_t>(draw));
      const at::Tensor hessian = what.calibration.hessian(sample_counts[i], generator);
      const Distance gptq = yardstick.quantized(hessian, options);
      mse.push_back(gptq.mse);
      loss.push_back(gptq.heldout_loss);
      progress.update(++done, 3 * sample_counts.size() * static_cast<size_t>(draws),
                      std::string(what.name) + ", " + std::to_string(sample_counts[i]) + " samples");
    }
    result["points"].push_back({{"samples", sample_counts[i]},
                                {"mse", spread(mse)},
                                {"heldout_loss", spread(loss)},
                                {"draws", {{"mse", mse}, {"heldout_loss", loss}}}});
  }
  return result;
}

void CalibrationStudy::run() {
  study.begin();
  Json results;
  results["cases"] = Json::array();
  {
    Progress progress("calibration");
    const at::Tensor weight = shape.draw(study.generator());
    const Inputs independent = Inputs::independent(shape.columns);
    const Inputs deployed = correlation.correlated(shape.columns, study.generator(1));
    const Inputs other = correlation.correlated(shape.columns, study.generator(2));
    size_t done = 0;
    for (const Case& what : {Case{"independent", independent, independent}, Case{"matched", deployed, deployed},
                             Case{"mismatched", other, deployed}}) {
      results["cases"].push_back(run_case(what, weight, progress, done));
    }
  }
  study.finish(results);
  std::printf("%-12s %8s %12s %12s %12s %12s\n", "case", "samples", "MSE", "std", "loss", "std");
  for (const Json& result : results["cases"]) {
    const std::string name = result["case"];
    std::printf("%-12s %8s %12.5g %12s %12.5g\n", name.c_str(), "RTN", result["rtn"]["mse"].get<double>(), "",
                result["rtn"]["heldout_loss"].get<double>());
    for (const Json& point : result["points"]) {
      std::printf("%-12s %8lld %12.5g %12.2g %12.5g %12.2g\n", name.c_str(),
                  static_cast<long long>(point["samples"].get<int64_t>()), point["mse"]["mean"].get<double>(),
                  point["mse"]["std"].get<double>(), point["heldout_loss"]["mean"].get<double>(),
                  point["heldout_loss"]["std"].get<double>());
    }
  }
}

}  // namespace

void add_calibration_study(CLI::App& lab) {
  const auto command = std::make_shared<CalibrationStudy>();
  CalibrationStudy& calibration = *command;
  calibration.quantizer.grid = "asymmetric";
  CLI::App* sub = lab.add_subcommand("calibration", "How many calibration samples, and from where");
  calibration.study.add_to(*sub);
  calibration.shape.add_to(*sub, calibration.study);
  calibration.study.setting(*sub, "sample-counts", calibration.sample_counts, "Numbers of inputs to calibrate on")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  calibration.study.setting(*sub, "draws", calibration.draws, "Draws of each number")->check(CLI::PositiveNumber);
  calibration.study.setting(*sub, "heldout-samples", calibration.heldout_samples, "Other inputs to measure on")
      ->check(CLI::PositiveNumber);
  calibration.study
      .setting(*sub, "group-size", calibration.group_size, "Inputs that share a scale; -1: one group per row")
      ->check(group_size_check());
  calibration.study.setting(*sub, "bits", calibration.bits, "Bits per weight")->check(CLI::Range(2, 8));
  calibration.quantizer.add_to(*sub, calibration.study);
  calibration.correlation.add_to(*sub, calibration.study);
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
