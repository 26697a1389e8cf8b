#include <gptq/quantize_module.h>

#include <cstdio>
#include <memory>
#include <set>

#include "model/aoti_package.h"
#include "model/json_file.h"
#include "tools/commands.h"
#include "tools/model_input.h"
#include "tools/report.h"

namespace gptq::tools {
namespace {

struct InspectCommand {
  ModelInput input;
  std::string json;

  void run() const;

 private:
  void list_metadata() const;
};

/// Tensors that several names share count once.
int64_t bytes_in_memory(const torch::jit::Module& module) {
  std::set<const void*> seen;
  int64_t bytes = 0;
  const auto add = [&](const at::Tensor& tensor) {
    if (seen.insert(tensor.data_ptr()).second) {
      bytes += static_cast<int64_t>(tensor.nbytes());
    }
  };
  for (const at::Tensor& tensor : module.parameters()) {
    add(tensor);
  }
  for (const at::Tensor& tensor : module.buffers()) {
    add(tensor);
  }
  return bytes;
}

/// Of a package, without running its code. Its linears are not to be told from the rest.
void InspectCommand::list_metadata() const {
  JsonOutput output(json);
  const AotiMetadata metadata = read_aoti_metadata(input.model);
  const char* kind = to_string(ModelKind::kAotInductor);
  std::printf("%s: %s\n", input.model.c_str(), kind);
  for (const auto& [name, value] : metadata) {
    std::printf("%-26s %s\n", show(name).c_str(), show(value).c_str());
  }
  output.write({{"kind", kind}, {"metadata", metadata}});
}

void InspectCommand::run() const {
  if (is_pt2_archive(input.model)) {
    list_metadata();
    return;
  }
  const LoadedModel model = input.load();
  JsonOutput output(json);
  const std::vector<LinearInfo> float_linears = find_linears(model.module);
  const std::vector<PackedLinearInfo> packed_linears = find_packed_linears(model.module);
  Json report;
  report["kind"] = to_string(model.kind);
  if (model.context_length) {
    report["context_length"] = *model.context_length;
  }
  const int64_t bytes = bytes_in_memory(model.module);
  report["bytes_in_memory"] = bytes;
  report["linears"] = Json::array();
  std::printf("%s: %s, %.1f MB in memory\n", model.source.c_str(), report["kind"].get<std::string>().c_str(),
              static_cast<double>(bytes) / 1e6);
  std::printf("%-40s %8s %8s  %s\n", "linear", "outputs", "inputs", "weight");
  const auto list = [&](const LinearInfo& linear, const char* form) {
    std::printf("%-40s %8lld %8lld  %s\n", linear.name.c_str(), static_cast<long long>(linear.out_features),
                static_cast<long long>(linear.in_features), form);
    report["linears"].push_back(
        {{"name", linear.name}, {"shape", {linear.out_features, linear.in_features}}, {"weight", form}});
  };
  for (const PackedLinearInfo& linear : packed_linears) {
    list(linear, linear.stored_bits == 8 ? "packed 8-bit" : "packed 4-bit");
  }
  for (const LinearInfo& linear : float_linears) {
    list(linear, linear.conv1d ? "float, [inputs, outputs]" : "float, [outputs, inputs]");
  }
  output.write(report);
}

}  // namespace

void add_inspect_command(CLI::App& app) {
  const auto command = std::make_shared<InspectCommand>();
  CLI::App* sub = app.add_subcommand("inspect", "List the linears of a model and how their weights are held");
  command->input.add_to(*sub);
  sub->add_option("--json", command->json, "File to write the result to");
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
