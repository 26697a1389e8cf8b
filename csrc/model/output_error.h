#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/jit/api/module.h>

#include <vector>

#include "model/perplexity.h"

namespace gptq {

/// How far the outputs of models lie from those of a reference: ‖ŷ - y‖ / ‖y‖ over all inputs, one for each model.
///
/// @param reference forward(input) -> a floating-point tensor y, alone, first in a tuple or under "logits" in a dict
/// @param models give a ŷ of the same shape
/// @param inputs at least one; each is the first argument of a call
/// @param progress gets the inputs done and all of them
/// @throws c10::Error where outputs are not finite, not of one shape, or where y is zero everywhere
std::vector<double> output_errors(torch::jit::Module reference, std::vector<torch::jit::Module> models,
                                  const std::vector<at::Tensor>& inputs, const EvaluationProgress& progress = {});

}  // namespace gptq
