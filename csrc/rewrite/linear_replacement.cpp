#include "rewrite/linear_replacement.h"

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

Value* twice(Graph& graph, Value* value) {
  return graph.insertNode(graph.createList(c10::TensorType::get(), {value, value}))->output();
}

Node* insert_linear_w4(Graph& graph, const LinearNode& linear, const QuantizedLinear& quantized,
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
  const bool split = quantized.bits > 4;
  Value* group_size =
      graph.insertConstant(split && quantized.group_size == -1 ? quantized.in_features : quantized.group_size);
  Value* compute = graph.insertConstant(std::string("exact"));
  Value* input = split ? graph.insert(c10::aten::cat, {twice(graph, linear.input()), -1}) : linear.input();
  return graph.insertNode(graph.create(c10::Symbol::fromQualString("gptq::linear_w4"),
                                       {input, packed, scales, zeros, bias, input_order, group_size, compute}));
}

Node* insert_float_linear(Graph& graph, const LinearNode& linear, const QuantizedLinear& quantized,
                          const TensorSupply& supply) {
  Value* weight = supply(graph, attribute_name(linear, "dequantized"), quantized.dequantized);
  Node* copy = graph.createClone(linear.node, [](Value* value) { return value; });
  const bool as_stored = linear.node->input(linear.weight_index) == linear.weight_value;
  copy->replaceInput(linear.weight_index, as_stored ? weight : graph.insert(c10::aten::t, {weight}));
  if (quantized.bias.defined()) {
    copy->replaceInput(*linear.bias_index, supply(graph, attribute_name(linear, kBias), quantized.bias));
  }
  return graph.insertNode(copy);
}

}  // namespace

Node* replace_linear(Graph& graph, const LinearNode& linear, const QuantizedLinear& quantized,
                     const TensorSupply& supply) {
  const torch::jit::WithInsertPoint at_linear(linear.node);
  Node* replacement = quantized.packed.defined() ? insert_linear_w4(graph, linear, quantized, supply)
                                                 : insert_float_linear(graph, linear, quantized, supply);
  replacement->output()->copyMetadata(linear.node->output());
  linear.node->output()->replaceAllUsesWith(replacement->output());
  linear.node->destroy();
  return replacement;
}

}  // namespace gptq::rewrite
