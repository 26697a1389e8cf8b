#include "rewrite/linear_replacement.h"

#include "rewrite/packed_weight.h"

namespace gptq::rewrite {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

/// Not "bias", which another linear may share.
constexpr const char* kBias = "corrected_bias";

/// "h.0.mlp.c_fc" -> "h.0.mlp.c_fc.packed"; a weight of another name ("attn.in_proj_weight") keeps it in front, so that
/// the layer's name is no module: "attn.in_proj_weight_packed".
std::string attribute_name(const LinearNode& linear, const std::string& tensor) {
  const auto path = attribute_path(linear.weight_value);
  const bool owned = path && *path != linear.name;
  return linear.name + (owned ? "." : "_") + tensor;
}

Node* insert_packed_linear(Graph& graph, const LinearNode& linear, const QuantizedLinear& quantized,
                           const TensorSupply& supply) {
  Value* none = graph.insertConstant(c10::IValue());
  const auto tensor = [&](const char* name, const at::Tensor& held) {
    return held.defined() ? supply(graph, attribute_name(linear, name), held) : none;
  };
  Value* packed = tensor("packed", quantized.packed);
  Value* scales = tensor("scales", quantized.scales);
  Value* zeros = tensor("zeros", quantized.zeros);
  Value* bias = quantized.bias.defined() ? tensor(kBias, quantized.bias)
                : linear.bias_index      ? linear.node->input(*linear.bias_index)
                                         : none;
  Value* input_order = tensor("input_order", quantized.input_order);
  Value* group_size = graph.insertConstant(quantized.group_size);
  Value* compute = graph.insertConstant(std::string("exact"));
  const char* name = packed_bits(quantized.bits) == 8 ? "gptq::linear_w8" : "gptq::linear_w4";
  return graph.insertNode(graph.create(c10::Symbol::fromQualString(name), {linear.input(), packed, scales, zeros, bias,
                                                                           input_order, group_size, compute}));
}

}  // namespace

Node* replace_linear(Graph& graph, const LinearNode& linear, const QuantizedLinear& quantized,
                     const TensorSupply& supply) {
  const torch::jit::WithInsertPoint at_linear(linear.node);
  Node* replacement = insert_packed_linear(graph, linear, quantized, supply);
  replacement->output()->copyMetadata(linear.node->output());
  linear.node->output()->replaceAllUsesWith(replacement->output());
  linear.node->destroy();
  return replacement;
}

}  // namespace gptq::rewrite
