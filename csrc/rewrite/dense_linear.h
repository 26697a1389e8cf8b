#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/ir/ir.h>

namespace gptq::rewrite {

/// Makes the float linears of a graph on the CPU run as gptq::linear_dense. Weights stored [K, N] become constants of
/// the graph, [N, K].
void speed_up_linears(torch::jit::Graph& graph, const torch::jit::Module& module);

}  // namespace gptq::rewrite
