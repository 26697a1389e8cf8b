#pragma once

#include <gptq/quantize_module.h>

#include <functional>
#include <string>

#include "rewrite/linear_finder.h"

namespace gptq::rewrite {

/// Gives the value that holds a new tensor of a layer, inserted at the graph's insert point. `attribute` is the path
/// the tensor is known by, as "h.0.mlp.c_fc.packed".
using TensorSupply =
    std::function<torch::jit::Value*(torch::jit::Graph& graph, const std::string& attribute, const at::Tensor& tensor)>;

/// Replaces one linear by its quantized form and returns the node that now computes it. The old node is destroyed.
torch::jit::Node* replace_linear(torch::jit::Graph& graph, const LinearNode& linear, const QuantizedLinear& quantized,
                                 const TensorSupply& supply);

}  // namespace gptq::rewrite
