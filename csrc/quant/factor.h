#pragma once

#include <ATen/core/Tensor.h>

namespace gptq {

/// What the sweep needs of a damped Hessian Hd = R Rᵀ, R upper triangular, its columns in sweep order.
struct Factor {
  at::Tensor order;        ///< i64 [K]: the column swept k-th
  at::Tensor multipliers;  ///< [K, K]: row k holds R_jk / R_kk for j < k, then 1, then zeros
  at::Tensor pivots;       ///< f64 [K]: R_kk², what is left of Hd_kk once later columns are known
  at::Tensor added;        ///< f64 [K]: what was added to the diagonal of H, in sweep order
  double damping = 0;
  int64_t damping_escalations = 0;
  bool float64 = false;
};

/// Factorises H + damping * mean(diag H) * I, as quantize_weight.h says.
/// @param hessian f32 or f64 [K, K], symmetric, finite, no negative diagonal; multipliers come in its dtype
/// @param order i64 [K], a permutation
/// @throws c10::Error if six escalations do not help
Factor factorise(const at::Tensor& hessian, const at::Tensor& order, double damping);

/// B Hd⁻¹.
/// @param rows [M, K] in the multipliers' dtype, columns as stored
at::Tensor times_inverse(const at::Tensor& rows, const Factor& factor);

}  // namespace gptq
