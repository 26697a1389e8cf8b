#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace gptq::rewrite {

/// A node that computes x · wᵀ (+ bias) with a weight that the module holds.
struct LinearNode {
  torch::jit::Node* node = nullptr;
  size_t input_index = 0;                     ///< which of the node's inputs is x
  size_t weight_index = 0;                    ///< which is the weight, as stored or transposed
  std::optional<size_t> bias_index;           ///< which is the bias, none or [N], where the node takes one
  torch::jit::Value* weight_value = nullptr;  ///< the value that holds the weight as stored
  std::string name;                           ///< see LinearInfo, as "transformer.h.0.mlp.c_fc"
  at::Tensor weight;                          ///< [N, K], or [K, N] if conv1d
  at::Tensor bias;                            ///< [N]; undefined: none
  bool conv1d = false;
  bool embedding = false;  ///< the weight is also looked up by an aten::embedding

  torch::jit::Value* input() const { return node->input(input_index); }
  int64_t out_features() const { return weight.size(conv1d ? 1 : 0); }
  int64_t in_features() const { return weight.size(conv1d ? 0 : 1); }
};

/// The graph of module.forward with every call inlined: one flat list of operators, attributes read by chains of
/// GetAttr from the first input.
std::shared_ptr<torch::jit::Graph> flatten_forward(const torch::jit::Module& module);

/// Every linear computation in a flat graph, nested blocks included, in the order of execution. They are recognised by
/// what they compute: aten::linear, or aten::addmm, mm and matmul with a two-dimensional weight of the module, stored
/// either way round.
std::vector<LinearNode> find_linears(torch::jit::Graph& graph, const torch::jit::Module& module);

/// Calls `use` on every node of a block, nested ones after the node they are nested in.
void for_each_node(torch::jit::Block* block, const std::function<void(torch::jit::Node*)>& use);

/// The bits of a code in a packed linear: 4 for gptq::linear_w4, 8 for linear_w8; nothing for any other node.
std::optional<int> packed_linear_bits(const torch::jit::Node* node);

/// The attribute path that a value is read by ("h.0.ln_1.weight"), if it is a chain of GetAttr from the graph's self.
std::optional<std::string> attribute_path(const torch::jit::Value* value);

/// What stands at an attribute path of a module.
c10::IValue attribute_at(const torch::jit::Module& module, const std::string& path);

}  // namespace gptq::rewrite
