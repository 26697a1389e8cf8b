#pragma once

#include <ATen/core/Tensor.h>

#include "quant/grid.h"

namespace gptq {

/// Coordinate descent on tr(E Hd Eᵀ), E = W - Q, group by group: codes one at a time, then the group's scale.
/// @param weight f32 or f64 [N, K], contiguous
/// @param damped [K, K] in the same dtype: Hd, columns as stored
/// @param codes u8 [N, K]; overwritten
/// @param fit_scales whether the scales of the grid may be overwritten too
void refine_codes(const at::Tensor& weight, const at::Tensor& damped, int64_t sweeps, bool fit_scales, Grid& grid,
                  at::Tensor& codes);

}  // namespace gptq
