#include <gptq/quantize_module.h>

#include <map>

#include "rewrite/calibration_pass.h"
#include "rewrite/flat_module.h"
#include "rewrite/linear_finder.h"
#include "rewrite/linear_replacement.h"

namespace gptq {
namespace {

LinearInfo info_of(const rewrite::LinearNode& linear) {
  return {linear.name, linear.out_features(), linear.in_features(), linear.conv1d, linear.embedding};
}

}  // namespace

int64_t QuantizedLinear::bytes() const {
  int64_t total = 0;
  for (const at::Tensor& tensor : {packed, scales, zeros, input_order}) {
    total += tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : 0;
  }
  return total;
}

std::vector<LinearInfo> find_linears(const torch::jit::Module& module) {
  const auto graph = rewrite::flatten_forward(module);
  std::vector<LinearInfo> found;
  for (const rewrite::LinearNode& linear : rewrite::find_linears(*graph, module)) {
    found.push_back(info_of(linear));
  }
  return found;
}

std::vector<PackedLinearInfo> find_packed_linears(const torch::jit::Module& module) {
  const auto graph = rewrite::flatten_forward(module);
  std::vector<PackedLinearInfo> found;
  rewrite::for_each_node(graph->block(), [&](torch::jit::Node* node) {
    const auto bits = rewrite::packed_linear_bits(node);
    if (!bits) {
      return;
    }
    if (const auto path = rewrite::attribute_path(node->input(1))) {
      const at::Tensor packed = rewrite::attribute_at(module, *path).toTensor();
      const at::Tensor scales = rewrite::attribute_at(module, *rewrite::attribute_path(node->input(2))).toTensor();
      found.push_back({{path->substr(0, path->rfind('.')), scales.size(1), packed.size(1) * 8, false}, *bits});
    }
  });
  return found;
}

QuantizedModule quantize_module(const torch::jit::Module& module,
                                const std::vector<std::vector<c10::IValue>>& calibration,
                                const QuantizeModuleOptions& options) {
  TORCH_CHECK(!module.attr("training", false).toBool(),
              "quantize_module: module must be in eval mode, got one in training mode");
  TORCH_CHECK(!calibration.empty() || options.quantize.mode == "rtn",
              "quantize_module: calibration must hold at least one input in mode \"", options.quantize.mode,
              "\", got none");
  TORCH_CHECK(options.token_weights.empty() || options.token_weights.size() == calibration.size(),
              "quantize_module: token_weights must be empty or one for each of the ", calibration.size(),
              " calibration inputs, got ", options.token_weights.size());
  const auto graph = rewrite::flatten_forward(module);
  QuantizedModule result;
  result.layers = rewrite::calibrate_and_quantize(module, *graph, calibration, options);

  std::map<std::string, const QuantizedLinear*> by_name;
  for (const QuantizedLinear& layer : result.layers) {
    by_name[layer.name] = &layer;
  }
  rewrite::FlatModule flat(module, graph);
  const rewrite::TensorSupply supply = [&](torch::jit::Graph&, const std::string& path, const at::Tensor& tensor) {
    return flat.insert_buffer(path, tensor);
  };
  for (const rewrite::LinearNode& linear : rewrite::find_linears(*graph, module)) {
    if (const auto layer = by_name.find(linear.name); layer != by_name.end()) {
      rewrite::replace_linear(*graph, linear, *layer->second, supply);
    }
  }
  result.module = flat.finish();
  return result;
}

}  // namespace gptq
