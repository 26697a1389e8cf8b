#include "rewrite/flat_module.h"

#include <torch/csrc/jit/passes/dead_code_elimination.h>

#include <vector>

#include "rewrite/linear_finder.h"

namespace gptq::rewrite {
namespace {

using torch::jit::Graph;
using torch::jit::Module;
using torch::jit::Node;
using torch::jit::Value;

constexpr const char* kTypePrefix = "__torch__.gptq.quantized.";

std::pair<std::string, std::string> split_path(const std::string& path) {
  const auto dot = path.rfind('.');
  return dot == std::string::npos ? std::pair{std::string(), path}
                                  : std::pair{path.substr(0, dot), path.substr(dot + 1)};
}

bool holds_module(const Value* value) {
  const auto type = value->type()->cast<c10::ClassType>();
  return type && type->is_module();
}

/// The GetAttr nodes that read something other than a submodule.
std::vector<Node*> attribute_reads(Graph& graph) {
  std::vector<Node*> reads;
  for_each_node(graph.block(), [&](Node* node) {
    if (node->kind() == c10::prim::GetAttr && !holds_module(node->output()) && attribute_path(node->output())) {
      reads.push_back(node);
    }
    for (const Value* input : node->inputs()) {
      TORCH_CHECK(!holds_module(input) || node->kind() == c10::prim::GetAttr,
                  "quantize_module: forward must only read attributes of the module, but it uses ",
                  node->kind().toQualString(), " on a module");
    }
  });
  return reads;
}

}  // namespace

FlatModule::FlatModule(const Module& source, std::shared_ptr<Graph> graph)
    : source_(source), graph_(std::move(graph)), unit_(std::make_shared<torch::jit::CompilationUnit>()) {
  submodules_.emplace("", Module(std::string(kTypePrefix) + "Model", unit_));
  graph_->inputs().at(0)->setType(submodules_.at("").type());
}

Module& FlatModule::submodule(const std::string& path) {
  if (const auto known = submodules_.find(path); known != submodules_.end()) {
    return known->second;
  }
  const auto [owner, name] = split_path(path);
  Module& parent = submodule(owner);
  Module child(std::string(kTypePrefix) + "Part" + std::to_string(submodules_.size()), unit_);
  parent.register_module(name, child);
  return submodules_.emplace(path, child).first->second;
}

Value* FlatModule::insert_read(const std::string& path) {
  const auto [owner, name] = split_path(path);
  Value* holder = owner.empty() ? graph_->inputs().at(0) : insert_read(owner);
  return graph_->insertGetAttr(holder, name);
}

void FlatModule::carry_over(const std::string& path) {
  const auto [owner, name] = split_path(path);
  Module& holder = submodule(owner);
  if (holder.hasattr(name)) {
    return;
  }
  const c10::IValue old_holder = owner.empty() ? source_._ivalue() : attribute_at(source_, owner);
  const auto type = old_holder.type()->expect<c10::ClassType>();
  const size_t slot = type->getAttributeSlot(name);
  holder.type()->addAttribute(name, type->getAttribute(slot), type->is_parameter(slot), type->is_buffer(slot));
  holder._ivalue()->setAttr(name, old_holder.toObjectRef().getSlot(slot));
}

Value* FlatModule::insert_buffer(const std::string& path, const at::Tensor& tensor) {
  const auto [owner, name] = split_path(path);
  submodule(owner).register_buffer(name, tensor);
  return insert_read(path);
}

Module FlatModule::finish() {
  torch::jit::EliminateDeadCode(graph_);
  for (Node* read : attribute_reads(*graph_)) {
    const std::string path = *attribute_path(read->output());
    carry_over(path);
    const torch::jit::WithInsertPoint at_read(read);
    Value* value = insert_read(path);
    value->copyMetadata(read->output());
    read->output()->replaceAllUsesWith(value);
  }
  torch::jit::EliminateDeadCode(graph_);

  Module& root = submodules_.at("");
  auto* forward = unit_->create_function(c10::QualifiedName(*root.type()->name(), "forward"), graph_);
  root.type()->addMethod(forward);
  const c10::FunctionSchema& schema = source_.get_method("forward").function().getSchema();
  std::vector<c10::Argument> arguments = schema.arguments();
  arguments.at(0) = c10::Argument("self", root.type());
  forward->setSchema(schema.cloneWithArguments(std::move(arguments)));
  root.eval();
  return root;
}

}  // namespace gptq::rewrite
