#include "rewrite/fused_layers.h"

#include <torch/csrc/jit/api/compilation_unit.h>
#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/constant_propagation.h>
#include <torch/csrc/jit/passes/inliner.h>

#include <string>
#include <vector>

#include "rewrite/linear_finder.h"

namespace gptq::rewrite {
namespace {

using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

// No linear stands inside a branch, where it could not be calibrated as well. As the operators do, a mask is taken for
// true wherever it is not zero, which is where a position is left out: [L, L] (type 0), [B, L] (1) or [B, H, L, L] (2).
constexpr const char* kSource = R"source(
def kept(mask: Tensor, mask_type: Optional[int]) -> Tensor:
    keep = mask.eq(0)
    if mask_type is not None and mask_type == 1:
        keep = keep.unsqueeze(1).unsqueeze(1)
    return keep

def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_heads: int,
                         qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
                         mask: Optional[Tensor], need_weights: bool, average_attn_weights: bool,
                         mask_type: Optional[int]) -> Tuple[Tensor, Tensor]:
    assert not query.is_nested, "a quantized attention takes no nested tensors: enable_nested_tensor=False avoids them"
    qkv = torch.linear(query, qkv_weight, qkv_bias)
    heads = qkv.view([query.size(0), query.size(1), 3, num_heads, -1]).permute([2, 0, 3, 1, 4])
    q, k, v = heads[0], heads[1], heads[2]
    if need_weights:
        scores = torch.matmul(q, k.transpose(-2, -1)) / float(q.size(-1)) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(kept(mask, mask_type).logical_not(), float("-inf"))
        weights = torch.softmax(scores, -1)
        attended = torch.matmul(weights, v)
        if average_attn_weights:
            weights = weights.mean(1)
    else:
        keep: Optional[Tensor] = None
        if mask is not None:
            keep = kept(mask, mask_type)
        attended = torch.scaled_dot_product_attention(q, k, v, keep)
        weights = torch.zeros([0])
    joined = attended.transpose(1, 2).flatten(2)
    return torch.linear(joined, proj_weight, proj_bias), weights

def transformer_encoder_layer(src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor,
                              proj_weight: Tensor, proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float,
                              norm_weight_1: Tensor, norm_bias_1: Tensor, norm_weight_2: Tensor, norm_bias_2: Tensor,
                              ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor, ffn_bias_2: Tensor,
                              mask: Optional[Tensor], mask_type: Optional[int]) -> Tensor:
    x = src
    if norm_first:
        x = torch.layer_norm(x, [embed_dim], norm_weight_1, norm_bias_1, eps)
    x = src + multi_head_attention(x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask,
                                   False, False, mask_type)[0]
    if not norm_first:
        x = torch.layer_norm(x, [embed_dim], norm_weight_1, norm_bias_1, eps)
    y = x
    if norm_first:
        y = torch.layer_norm(y, [embed_dim], norm_weight_2, norm_bias_2, eps)
    y = torch.linear(y, ffn_weight_1, ffn_bias_1)
    if use_gelu:
        y = torch.gelu(y)
    else:
        y = torch.relu(y)
    y = x + torch.linear(y, ffn_weight_2, ffn_bias_2)
    if not norm_first:
        y = torch.layer_norm(y, [embed_dim], norm_weight_2, norm_bias_2, eps)
    return y
)source";

/// The name in kSource of what an operator computes; empty: it is none of them.
std::string decomposition_of(const Node* node) {
  static const auto encoder_layer = c10::Symbol::fromQualString("aten::_transformer_encoder_layer_fwd");
  static const auto attention = c10::Symbol::fromQualString("aten::_native_multi_head_attention");
  if (node->kind() == encoder_layer) {
    return "transformer_encoder_layer";
  }
  const bool of_itself =
      node->kind() == attention && node->input(0) == node->input(1) && node->input(1) == node->input(2);
  return of_itself ? "multi_head_attention" : "";
}

/// A function's graph in which the branches that a node's constant inputs decide are gone.
std::shared_ptr<Graph> specialized(Graph& function, const Node* node) {
  auto graph = function.copy();
  torch::jit::Inline(*graph);
  const torch::jit::WithInsertPoint at_start(*graph->nodes().begin());
  for (size_t i = 0; i < node->inputs().size(); ++i) {
    if (const auto constant = torch::jit::toIValue(node->input(i)); constant && !constant->isTensor()) {
      graph->inputs()[i]->replaceAllUsesWith(graph->insertConstant(*constant));
    }
  }
  torch::jit::ConstantPropagation(graph);
  return graph;
}

void replace(Graph& graph, Node* node, Graph& function) {
  const torch::jit::WithInsertPoint at_node(node);
  Value* result = torch::jit::insertGraph(graph, function, node->inputs()).at(0);
  if (node->outputs().size() == 1) {
    node->output()->replaceAllUsesWith(result);
  } else {
    node->replaceAllUsesWith(graph.insertNode(graph.createTupleUnpack(result)));
  }
  node->destroy();
}

}  // namespace

void decompose_fused_layers(const std::shared_ptr<Graph>& graph) {
  std::vector<Node*> fused;
  for_each_node(graph->block(), [&](Node* node) {
    if (!decomposition_of(node).empty()) {
      fused.push_back(node);
    }
  });
  if (fused.empty()) {
    return;
  }
  torch::jit::CompilationUnit unit;
  unit.define(std::nullopt, kSource, torch::jit::nativeResolver(), nullptr);
  for (Node* node : fused) {
    const auto function = torch::jit::toGraphFunction(unit.get_function(decomposition_of(node))).graph();
    replace(*graph, node, *specialized(*function, node));
  }
}

}  // namespace gptq::rewrite
