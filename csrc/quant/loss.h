#pragma once

#include <ATen/core/Tensor.h>

namespace gptq {

/// tr(A H Aᵀ), summed in float64; with H undefined, of H = I.
/// @param rows f32 or f64 [N, K]
/// @param hessian [K, K] in the same dtype
double quadratic_form(const at::Tensor& rows, const at::Tensor& hessian);

}  // namespace gptq
