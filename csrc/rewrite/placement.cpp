#include "rewrite/placement.h"

#include <ATen/ATen.h>
#include <torch/csrc/jit/ir/constants.h>

#include <optional>
#include <vector>

#include "rewrite/flat_module.h"
#include "rewrite/linear_finder.h"

namespace gptq::rewrite {
namespace {

using torch::jit::Graph;
using torch::jit::Node;

bool holds_tensors(const c10::IValue& value) {
  bool found = false;
  value.visit([&](const c10::IValue& part) { return found = found || part.isTensor(); });
  return found;
}

/// What a node always gives, where that holds a tensor.
std::optional<c10::IValue> fixed_tensors(const Node* node, const torch::jit::Module& module) {
  if (node->outputs().size() != 1) {
    return std::nullopt;
  }
  std::optional<c10::IValue> held;
  if (node->kind() == c10::prim::Constant) {
    held = torch::jit::toIValue(node->output());
  } else if (const auto path = attribute_path(node->output())) {
    held = attribute_at(module, *path);
  }
  return held && !held->isObject() && holds_tensors(*held) ? held : std::nullopt;
}

void replace_with_constant(Graph& graph, Node* node, const c10::IValue& value) {
  const torch::jit::WithInsertPoint at_node(node);
  const auto constant = torch::jit::tryInsertConstant(graph, value);
  TORCH_CHECK(constant.has_value(), "quantize_module: an attribute of type ", node->output()->type()->repr_str(),
              " cannot be copied to another device");
  (*constant)->copyMetadata(node->output());
  node->output()->replaceAllUsesWith(*constant);
}

std::vector<Node*> nodes_of(Graph& graph) {
  std::vector<Node*> nodes;
  for_each_node(graph.block(), [&](Node* node) { nodes.push_back(node); });
  return nodes;
}

}  // namespace

void retarget_devices(Graph& graph, at::Device device) {
  for (Node* node : nodes_of(graph)) {
    const auto held = node->kind() == c10::prim::Constant ? torch::jit::toIValue(node->output()) : std::nullopt;
    if (held && held->isDevice() && !held->toDevice().is_meta()) {
      replace_with_constant(graph, node, device);
    }
  }
}

void read_copies(Graph& graph, const torch::jit::Module& module, DeviceCopies& copies) {
  const at::NoGradGuard no_grad;
  for (Node* node : nodes_of(graph)) {
    if (const auto held = fixed_tensors(node, module)) {
      const c10::IValue copy = copies.of(*held);
      replace_with_constant(graph, node, copy.isTensor() ? c10::IValue(copy.toTensor().detach()) : copy);
    }
  }
}

torch::jit::Module copy_to(const torch::jit::Module& module, at::Device device) {
  const at::NoGradGuard no_grad;
  const auto graph = flatten_forward(module);
  retarget_devices(*graph, device);
  DeviceCopies copies(device);
  for (Node* node : nodes_of(*graph)) {
    if (node->kind() == c10::prim::Constant) {
      if (const auto held = fixed_tensors(node, module)) {
        replace_with_constant(*graph, node, copies.of(*held));
      }
    }
  }
  return FlatModule(module, graph).finish().deepcopy(device);
}

at::Device device_of(const torch::jit::Module& module) {
  for (const at::Tensor& parameter : module.parameters()) {
    return parameter.device();
  }
  for (const at::Tensor& buffer : module.buffers()) {
    return buffer.device();
  }
  return at::kCPU;
}

}  // namespace gptq::rewrite
