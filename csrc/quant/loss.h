#pragma once

#include <ATen/core/Tensor.h>

namespace gptq {

/// a H aᵀ of each row a of A, f64 [N], summed in float64; with H undefined, of H = I.
/// @param rows f32 or f64 [N, K]
/// @param hessian [K, K] in the same dtype
at::Tensor row_forms(const at::Tensor& rows, const at::Tensor& hessian);

/// The same by coarse_product: a few per mille off for each row of random signs.
at::Tensor coarse_row_forms(const at::Tensor& rows, const at::Tensor& hessian);

/// tr(A H Aᵀ): the sum of row_forms.
double quadratic_form(const at::Tensor& rows, const at::Tensor& hessian);

}  // namespace gptq
