#pragma once

#include <ATen/core/Tensor.h>

#include "quant/plan.h"

namespace gptq {

/// Scale and zero point of one group.
struct GridPoint {
  float scale;  ///< a float16 value, positive
  uint8_t zero;
};

/// Scales and zero points of a weight.
struct Grid {
  GridRule rule;
  int64_t group_size;  ///< 1..K
  at::Tensor scales;   ///< f16 [n_groups, N]
  at::Tensor zeros;    ///< u8 [n_groups, N]
};

/// The min/max grid of values in [lo, hi], see quantize_weight.h.
GridPoint minmax_grid_point(double lo, double hi, const GridRule& rule);

/// @param weight f32 or f64 [N, K], contiguous
Grid minmax_grid(const at::Tensor& weight, const Plan& plan);

/// Codes u8 [N, K] nearest to the weight, half to even.
/// @param weight f32 or f64 [N, K], contiguous
at::Tensor round_to_grid(const at::Tensor& weight, const Grid& grid);

/// (code - zero) * scale, [N, K] in the given dtype, f32 or f64.
at::Tensor dequantize_codes(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros,
                            int64_t group_size, at::ScalarType dtype);

}  // namespace gptq
