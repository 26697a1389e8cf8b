#pragma once

#include <ATen/core/Tensor.h>

#include "quant/factor.h"
#include "quant/grid.h"

namespace gptq {

struct SweepResult {
  at::Tensor codes;   ///< u8 [N, K], columns as in the weight
  at::Tensor losses;  ///< f64 [N]: e H eᵀ of each row, H without damping, to the factor's accuracy
};

/// Sweeps the columns in the factor's order: T_k = w_k + Σ_{j<k} e_j M_jk, q_k = grid(T_k), e_k = w_k - q_k.
/// @param weight [N, K] in the dtype of the factor's multipliers, contiguous
/// @param grid with plan.dynamic_groups its scales and zero points are overwritten
SweepResult sweep(const at::Tensor& weight, const Factor& factor, const Plan& plan, Grid& grid);

}  // namespace gptq
