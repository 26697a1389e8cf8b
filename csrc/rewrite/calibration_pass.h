#pragma once

#include <gptq/quantize_module.h>
#include <torch/csrc/jit/ir/ir.h>

#include <vector>

namespace gptq::rewrite {

/// Quantizes the linears of a flat graph one after the other, see quantize_module. Neither argument is changed.
std::vector<QuantizedLinear> calibrate_and_quantize(const torch::jit::Module& module, torch::jit::Graph& graph,
                                                    const std::vector<std::vector<c10::IValue>>& calibration,
                                                    const QuantizeModuleOptions& options);

}  // namespace gptq::rewrite
