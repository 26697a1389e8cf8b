#include <cstdio>
#include <memory>

#include "tools/lab_common.h"
#include "tools/progress.h"

namespace gptq::tools {
namespace {

std::string group_name(int64_t group_size) {
  return group_size == -1 ? "row" : std::to_string(group_size);
}

struct GroupSizeStudy {
  Study study{"group-size"};
  WeightFlags shape{4096, 4096};
  QuantizerFlags quantizer;
  InputFlags correlation;
  std::string inputs = "independent";
  std::vector<int64_t> group_sizes{32, 64, 128, 256, 512, 1024, -1};
  int64_t samples = 100;
  int64_t bits = 4;

  void run();
};

void GroupSizeStudy::run() {
  study.begin();
  Json results;
  results["groups"] = Json::array();
  {
    Progress progress("group-size");
    const at::Tensor weight = shape.draw(study.generator());
    const bool independent = inputs == "independent";
    const Inputs source =
        independent ? Inputs::independent(shape.columns) : correlation.correlated(shape.columns, study.generator(1));
    const at::Tensor hessian = source.hessian(samples, study.generator(2));
    const Yardstick yardstick(weight, independent ? at::Tensor() : source.covariance());
    for (size_t i = 0; i < group_sizes.size(); ++i) {
      const QuantizeOptions options = quantizer.options(bits, group_sizes[i]);
      const double effective = effective_bits(shape.rows, shape.columns, options);
      results["groups"].push_back({{"group_size", group_sizes[i]},
                                   {"rtn", yardstick.rounded(hessian, options).json()},
                                   {"gptq", yardstick.quantized(hessian, options).json()},
                                   {"effective_bits", effective},
                                   {"compression_32", 32 / effective},
                                   {"compression_16", 16 / effective}});
      progress.update(i + 1, group_sizes.size(), "group size " + group_name(group_sizes[i]));
    }
  }
  study.finish(results);
  std::printf("%-6s %10s %8s %12s %12s %12s %12s\n", "group", "bits", "of 16", "RTN MSE", "GPTQ MSE", "RTN loss",
              "GPTQ loss");
  for (const Json& row : results["groups"]) {
    std::printf("%-6s %10.4f %7.2fx %12.4g %12.4g %12.5g %12.5g\n",
                group_name(row["group_size"].get<int64_t>()).c_str(), row["effective_bits"].get<double>(),
                row["compression_16"].get<double>(), row["rtn"]["mse"].get<double>(), row["gptq"]["mse"].get<double>(),
                row["rtn"]["loss"].get<double>(), row["gptq"]["loss"].get<double>());
  }
}

}  // namespace

void add_group_size_study(CLI::App& lab) {
  const auto command = std::make_shared<GroupSizeStudy>();
  GroupSizeStudy& groups = *command;
  groups.quantizer.grid = "asymmetric";
  CLI::App* sub = lab.add_subcommand("group-size", "Group sizes: error against bits per weight");
  groups.study.add_to(*sub);
  groups.shape.add_to(*sub, groups.study);
  groups.study.setting(*sub, "group-sizes", groups.group_sizes, "Inputs that share a scale; -1: one group per row")
      ->delimiter(',')
      ->check(group_size_check());
  groups.study.setting(*sub, "bits", groups.bits, "Bits per weight")->check(CLI::Range(2, 8));
  groups.quantizer.add_to(*sub, groups.study);
  groups.study.setting(*sub, "samples", groups.samples, "Inputs to calibrate on")->check(CLI::PositiveNumber);
  groups.study.setting(*sub, "inputs", groups.inputs, "independent or correlated channels")
      ->check(CLI::IsMember({"independent", "correlated"}));
  groups.correlation.add_to(*sub, groups.study);
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
