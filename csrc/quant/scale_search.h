#pragma once

#include <ATen/core/Tensor.h>

#include "quant/grid.h"

namespace gptq {

/// Replaces the scales and zero points of a min/max grid by those that make Σ_k importance_k (w_k - q_k)² small in
/// every group. Scales of a symmetric grid may become negative, so that the code without an opposite covers the larger
/// extreme.
/// @param weight f32 or f64 [N, K], contiguous
/// @param importance f64 [K], at least 0
void search_grid(const at::Tensor& weight, const at::Tensor& importance, Grid& grid);

}  // namespace gptq
