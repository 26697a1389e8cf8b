#include "rewrite/linear_finder.h"

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/passes/lower_tuples.h>

#include <map>
#include <set>
#include <sstream>
#include <string_view>
#include <tuple>
#include <utility>

#include "rewrite/fused_layers.h"

namespace gptq::rewrite {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

bool is_kind(const Node* node, const char* kind) {
  return node->kind() == c10::Symbol::fromQualString(kind);
}

/// The tensor that a value always holds: an attribute of the module or a constant (in a frozen module).
at::Tensor fixed_tensor(const Value* value, const torch::jit::Module& module) {
  c10::IValue held;
  if (const auto path = attribute_path(value)) {
    held = attribute_at(module, *path);
  } else if (const auto constant = torch::jit::toIValue(value)) {
    held = *constant;
  }
  return held.isTensor() ? held.toTensor() : at::Tensor();
}

/// Whether a node swaps the two dimensions of a matrix.
bool is_transpose(const Node* node) {
  if (is_kind(node, "aten::t") || is_kind(node, "aten::numpy_T")) {
    return true;
  }
  if (!is_kind(node, "aten::transpose")) {
    return false;
  }
  const auto first = torch::jit::toIValue(node->input(1));
  const auto second = torch::jit::toIValue(node->input(2));
  return first && second && (first->toInt() - second->toInt()) % 2 != 0;
}

/// Steps back over operators that only pass a weight on, noting whether it is transposed on the way.
Value* stored_weight(Value* value, bool& transposed) {
  for (;;) {
    Node* node = value->node();
    if (is_transpose(node)) {
      transposed = !transposed;
    } else if (!is_kind(node, "aten::detach")) {
      return value;
    }
    value = node->input(0);
  }
}

bool is_one(const Value* value) {
  const auto constant = torch::jit::toIValue(value);
  return constant && constant->isScalar() && constant->toScalar().to<double>() == 1.0;
}

std::string without_suffix(const std::string& path, std::string_view suffix) {
  return path.ends_with(suffix) ? path.substr(0, path.size() - suffix.size()) : path;
}

/// Names linears so that each weight, the one way round or the other, has one name: the first that it is read by.
class Namer {
 public:
  std::string name(const LinearNode& linear) {
    const at::Tensor& weight = linear.weight;
    const View view{weight.const_data_ptr(), weight.sizes().vec(), weight.strides().vec()};
    const auto [known, is_new] = names_.try_emplace({view, linear.conv1d});
    if (is_new) {
      known->second = path(linear.weight_value, view);
      while (!taken_.insert(known->second).second) {
        known->second += "_transposed";
      }
    }
    return known->second;
  }

 private:
  using View = std::tuple<const void*, std::vector<int64_t>, std::vector<int64_t>>;

  /// Constants are numbered in the order of execution: their names in the graph change when it is copied.
  std::string path(const Value* weight, const View& view) {
    if (const auto attribute = attribute_path(weight)) {
      return without_suffix(*attribute, ".weight");
    }
    return "constant_" + std::to_string(constants_.emplace(view, constants_.size()).first->second);
  }

  std::map<std::pair<View, bool>, std::string> names_;
  std::set<std::string> taken_;
  std::map<View, size_t> constants_;
};

/// Fills in what is known of a linear; `takes_nk` tells whether the node takes its weight as [N, K].
std::optional<LinearNode> linear_with(Node* node, size_t input, size_t weight, std::optional<size_t> bias,
                                      bool takes_nk, const torch::jit::Module& module) {
  bool transposed = false;
  LinearNode linear;
  linear.node = node;
  linear.input_index = input;
  linear.weight_index = weight;
  linear.bias_index = bias;
  linear.weight_value = stored_weight(node->input(weight), transposed);
  linear.weight = fixed_tensor(linear.weight_value, module);
  if (!linear.weight.defined() || linear.weight.dim() != 2 || !at::isFloatingType(linear.weight.scalar_type()) ||
      linear.weight.numel() == 0) {
    return std::nullopt;
  }
  linear.conv1d = takes_nk == transposed;
  return linear;
}

/// Fills in the bias, if the node takes one; false if it takes something else in its place.
bool has_usable_bias(LinearNode& linear, const torch::jit::Module& module) {
  const Value* bias = linear.node->input(*linear.bias_index);
  if (bias->type()->kind() == c10::TypeKind::NoneType) {
    return true;
  }
  linear.bias = fixed_tensor(bias, module);
  return linear.bias.defined() && linear.bias.dim() == 1 && linear.bias.size(0) == linear.out_features() &&
         at::isFloatingType(linear.bias.scalar_type());
}

std::optional<LinearNode> match(Node* node, const torch::jit::Module& module) {
  std::optional<LinearNode> linear;
  if (is_kind(node, "aten::linear")) {
    linear = linear_with(node, 0, 1, 2, true, module);
  } else if (is_kind(node, "aten::addmm") && is_one(node->input(3)) && is_one(node->input(4))) {
    linear = linear_with(node, 1, 2, 0, false, module);
  } else if (is_kind(node, "aten::mm") || is_kind(node, "aten::matmul")) {
    linear = linear_with(node, 0, 1, std::nullopt, false, module);
  }
  return linear && linear->bias_index && !has_usable_bias(*linear, module) ? std::nullopt : linear;
}

}  // namespace

std::shared_ptr<Graph> flatten_forward(const torch::jit::Module& module) {
  const auto method = module.find_method("forward");
  TORCH_CHECK(method.has_value(), "quantize_module: module must have a forward method, got ",
              module.type()->repr_str());
  auto graph = method->graph()->copy();
  torch::jit::Inline(*graph);
  decompose_fused_layers(graph);
  // A tuple that a block of layers returns would keep all its parts alive for as long as one of them is needed.
  torch::jit::LowerSimpleTuples(graph);
  return graph;
}

std::vector<LinearNode> find_linears(Graph& graph, const torch::jit::Module& module) {
  std::vector<LinearNode> found;
  Namer namer;
  std::set<const void*> embeddings;
  for_each_node(graph.block(), [&](Node* node) {
    if (auto linear = match(node, module)) {
      linear->name = namer.name(*linear);
      found.push_back(std::move(*linear));
    } else if (node->kind() == c10::aten::embedding) {
      const at::Tensor weight = fixed_tensor(node->input(0), module);
      embeddings.insert(weight.defined() ? weight.const_data_ptr() : nullptr);
    }
  });
  for (LinearNode& linear : found) {
    linear.embedding = embeddings.count(linear.weight.const_data_ptr()) > 0;
  }
  return found;
}

void for_each_node(Block* block, const std::function<void(Node*)>& use) {
  for (Node* node : block->nodes()) {
    use(node);
    for (Block* nested : node->blocks()) {
      for_each_node(nested, use);
    }
  }
}

std::optional<int> packed_linear_bits(const Node* node) {
  if (is_kind(node, "gptq::linear_w4")) return 4;
  if (is_kind(node, "gptq::linear_w8")) return 8;
  return std::nullopt;
}

std::optional<std::string> attribute_path(const Value* value) {
  std::string path;
  while (value->node()->kind() == c10::prim::GetAttr) {
    const std::string& name = value->node()->s(c10::attr::name);
    path = path.empty() ? name : name + "." + path;
    value = value->node()->input(0);
  }
  const Graph* graph = value->owningGraph();
  if (path.empty() || graph->inputs().empty() || value != graph->inputs().at(0)) {
    return std::nullopt;
  }
  return path;
}

c10::IValue attribute_at(const torch::jit::Module& module, const std::string& path) {
  c10::IValue current = module._ivalue();
  std::istringstream parts(path);
  for (std::string part; std::getline(parts, part, '.');) {
    current = current.toObjectRef().getAttr(part);
  }
  return current;
}

}  // namespace gptq::rewrite
