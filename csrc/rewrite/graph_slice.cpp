#include "rewrite/graph_slice.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include <unordered_set>

#include "rewrite/linear_finder.h"

namespace gptq::rewrite {
namespace {

using torch::jit::Block;
using torch::jit::Graph;
using torch::jit::Node;
using torch::jit::Value;

bool is_reread(const Value* value) {
  return value->node()->kind() == c10::prim::Constant || attribute_path(value).has_value();
}

/// Calls `use` on every value that the node, or a node nested in it, reads.
template <typename Use>
void for_each_read(const Node* node, const Use& use) {
  for (const Value* input : node->inputs()) {
    use(input);
  }
  for (const Block* block : node->blocks()) {
    for (const Node* nested : block->nodes()) {
      for_each_read(nested, use);
    }
    for_each_read(block->return_node(), use);
  }
}

}  // namespace

Node* top_level(Node* node) {
  while (Node* owner = node->owningBlock()->owningNode()) {
    node = owner;
  }
  return node;
}

std::vector<const Value*> values_needed_from(const Graph& graph, Node* node) {
  std::unordered_set<const Value*> seen;
  std::vector<const Value*> needed;
  const Value* self = graph.inputs().at(0);
  for (Node* reader = node; reader != graph.return_node(); reader = reader->next()) {
    for_each_read(reader, [&](const Value* value) {
      const Node* source = value->node();
      const bool outer = source->owningBlock() == graph.block();
      const bool before = source->kind() == c10::prim::Param || source->isBefore(node);
      if (outer && before && value != self && !is_reread(value) && seen.insert(value).second) {
        needed.push_back(value);
      }
    });
  }
  return needed;
}

GraphSlice::GraphSlice(const Graph& graph, Node* begin, Node* end, const std::vector<const Value*>& needed_after)
    : slice_(std::make_shared<Graph>()), outputs_(needed_after) {
  self_ = slice_->addInput("self");
  self_->setType(graph.inputs().at(0)->type());
  values_[graph.inputs().at(0)] = self_;
  for (Node* node = begin; node != end; node = node->next()) {
    if (!(node->outputs().size() == 1 && is_reread(node->output()))) {
      clone_node(node);
    }
  }
  for (const Value* output : outputs_) {
    slice_->registerOutput(mapped(output));
  }
}

void GraphSlice::clone_node(Node* node) {
  for_each_read(node, [&](const Value* value) {
    if (value->node()->owningBlock() == node->owningBlock()) {
      mapped(value);
    }
  });
  Node* clone = slice_->createClone(node, [&](Value* value) { return values_.at(value); });
  slice_->insertNode(clone);
  for (size_t i = 0; i < node->outputs().size(); ++i) {
    values_[node->output(i)] = clone->output(i);
  }
  pair_nested(node, clone);
}

Value* GraphSlice::mapped(const Value* value) {
  if (const auto known = values_.find(value); known != values_.end()) {
    return known->second;
  }
  if (is_reread(value)) {
    clone_node(const_cast<Node*>(value->node()));
    return values_.at(value);
  }
  Value* input = slice_->addInput();
  input->setType(value->type());
  inputs_.push_back(value);
  return values_[value] = input;
}

void GraphSlice::pair_nested(Node* original, Node* clone) {
  clones_[original] = clone;
  for (size_t b = 0; b < original->blocks().size(); ++b) {
    auto copied = clone->blocks()[b]->nodes().begin();
    for (Node* nested : original->blocks()[b]->nodes()) {
      pair_nested(nested, *copied);
      ++copied;
    }
  }
}

Value* GraphSlice::add_input(const c10::TypePtr& type) {
  return slice_->addInput()->setType(type);
}

void GraphSlice::compile() {
  code_ = std::make_unique<torch::jit::Code>(slice_, "gptq_slice");
}

void GraphSlice::run(const torch::jit::Module& module, LiveValues& live, const std::vector<c10::IValue>& added) const {
  const at::NoGradGuard no_grad;
  torch::jit::Stack stack;
  stack.reserve(1 + inputs_.size() + added.size());
  stack.emplace_back(module._ivalue());
  for (const Value* input : inputs_) {
    stack.push_back(live.at(input));
  }
  stack.insert(stack.end(), added.begin(), added.end());
  live.clear();
  torch::jit::InterpreterState(*code_).run(stack);
  for (size_t i = 0; i < outputs_.size(); ++i) {
    live.emplace(outputs_[i], std::move(stack[i]));
  }
}

}  // namespace gptq::rewrite
