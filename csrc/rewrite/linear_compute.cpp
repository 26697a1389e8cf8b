#include <gptq/quantize_module.h>
#include <torch/csrc/jit/api/function_impl.h>
#include <torch/csrc/jit/ir/ir.h>

#include <unordered_set>
#include <vector>

#include "linear_w4_check.h"
#include "rewrite/linear_finder.h"

namespace gptq {
namespace {

using torch::jit::Graph;
using torch::jit::Node;

int64_t set_compute(Graph& graph, const std::string& compute) {
  std::vector<Node*> linears;
  rewrite::for_each_node(graph.block(), [&](Node* node) {
    if (rewrite::packed_linear_bits(node)) linears.push_back(node);
  });
  for (Node* linear : linears) {
    const torch::jit::WithInsertPoint at_linear(linear);
    const auto index = linear->schema().argumentIndexWithName("compute");
    linear->replaceInput(static_cast<size_t>(index.value()), graph.insertConstant(compute));
  }
  return static_cast<int64_t>(linears.size());
}

}  // namespace

int64_t set_linear_compute(const torch::jit::Module& module, const std::string& compute) {
  check_linear_compute("set_linear_compute", compute);
  std::unordered_set<Graph*> graphs;
  for (const torch::jit::Module& part : module.modules()) {
    for (const torch::jit::Method& method : part.get_methods()) {
      if (auto* function = torch::jit::tryToGraphFunction(method.function())) graphs.insert(function->graph().get());
    }
  }
  int64_t linears = 0;
  for (Graph* graph : graphs) linears += set_compute(*graph, compute);
  return linears;
}

}  // namespace gptq
