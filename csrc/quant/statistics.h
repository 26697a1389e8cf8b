#pragma once

#include <gptq/quantize_weight.h>

#include "quant/plan.h"

namespace gptq {

/// The weight as f32 or f64, contiguous, on its device or, if that has no kernels, on the CPU.
/// @throws c10::Error
at::Tensor checked_weight(const at::Tensor& weight);

/// Checks what the plan reads, brings it into the weight's dtype, and leaves the rest undefined.
/// @param weight from checked_weight
/// @throws c10::Error
LayerStatistics checked_statistics(const LayerStatistics& statistics, const at::Tensor& weight, const Plan& plan);

/// The statistics where the weight is solved.
/// @param device where they have to be
/// @throws c10::Error
LayerStatistics moved_to(at::Device solver, const LayerStatistics& statistics, at::Device device);

/// The statistics of x̂ - μ̂ and x - μ, in place of H and D. The means stay.
LayerStatistics centred(const LayerStatistics& statistics);

/// The statistics of inputs in another order.
/// @param order i64 [K]
LayerStatistics permuted(const LayerStatistics& statistics, const at::Tensor& order);

/// Throws unless all values are finite.
void check_finite(const at::Tensor& values, const char* name);

}  // namespace gptq
