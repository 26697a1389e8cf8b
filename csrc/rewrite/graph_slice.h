#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/runtime/interpreter.h>

#include <memory>
#include <unordered_map>
#include <vector>

namespace gptq::rewrite {

/// The values that are alive at one point of a flat graph, of one run of it.
using LiveValues = std::unordered_map<const torch::jit::Value*, c10::IValue>;

/// A stretch of the top-level nodes of a flat graph, made runnable by itself.
///
/// Inputs are the values computed before the stretch that it reads; outputs are those that nodes after it read.
/// Constants and attributes of the module are read anew in every stretch, so a replaced weight is not kept alive.
class GraphSlice {
 public:
  /// @param begin first node of the stretch, @param end the node after its last
  /// @param needed_after outputs to give; see values_needed_from
  GraphSlice(const torch::jit::Graph& graph, torch::jit::Node* begin, torch::jit::Node* end,
             const std::vector<const torch::jit::Value*>& needed_after);

  /// The graph that runs, and for each node of the stretch, nested ones included, its copy in it.
  torch::jit::Graph& graph() { return *slice_; }
  torch::jit::Node* clone_of(const torch::jit::Node* node) const { return clones_.at(node); }

  /// Adds an input that every run is given, see `added`.
  torch::jit::Value* add_input(const c10::TypePtr& type);

  /// Makes the graph, as it is now, what runs.
  void compile();

  /// Replaces the values alive before the stretch by those alive after it. `added` has a value for each added input.
  /// Several threads may run a compiled slice at once.
  void run(const torch::jit::Module& module, LiveValues& live, const std::vector<c10::IValue>& added = {}) const;

 private:
  void clone_node(torch::jit::Node* node);
  torch::jit::Value* mapped(const torch::jit::Value* value);
  void pair_nested(torch::jit::Node* original, torch::jit::Node* clone);

  std::shared_ptr<torch::jit::Graph> slice_;
  torch::jit::Value* self_;
  std::unordered_map<const torch::jit::Value*, torch::jit::Value*> values_;
  std::unordered_map<const torch::jit::Node*, torch::jit::Node*> clones_;
  std::vector<const torch::jit::Value*> inputs_;
  std::vector<const torch::jit::Value*> outputs_;
  std::unique_ptr<torch::jit::Code> code_;
};

/// The values computed before `node` that it or a later node of the graph's top level reads, in a fixed order. Neither
/// the graph's own outputs count, nor constants and attributes.
std::vector<const torch::jit::Value*> values_needed_from(const torch::jit::Graph& graph, torch::jit::Node* node);

/// The top-level node that a node stands in (itself, if it is not nested).
torch::jit::Node* top_level(torch::jit::Node* node);

}  // namespace gptq::rewrite
