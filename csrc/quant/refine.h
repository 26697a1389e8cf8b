#pragma once

#include <ATen/core/Tensor.h>

#include "quant/grid.h"

namespace gptq {

/// Coordinate descent on tr(E Hd Eᵀ), E = W - Q, group by group: codes one at a time, then the group's scale.
/// @param weight f32 or f64 [N, K], contiguous
/// @param hessian [K, K] in the same dtype, contiguous: H
/// @param added f64 [K]: the diagonal of Hd - H
/// @param fit_scales whether the scales of the grid may be overwritten too
/// @param codes u8 [N, K]; overwritten
/// @param losses f64 [N]: e H eᵀ of each row; overwritten, by adding up what every move changes
void refine_codes(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& added, int64_t sweeps,
                  bool fit_scales, Grid& grid, at::Tensor& codes, at::Tensor& losses);

}  // namespace gptq
