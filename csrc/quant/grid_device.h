#pragma once

#include <ATen/core/Tensor.h>

#include "quant/grid.h"

namespace gptq {

// What grid.h does, by ATen, for tensors on a device.

/// Scales and zero points of groups, in the dtype of their ranges.
struct GridPoints {
  at::Tensor scales;  ///< float16 values; beyond the largest of them infinite, see check_scales
  at::Tensor zeros;
};

/// As minmax_grid_point, for every group whose values lie in [lo, hi].
GridPoints minmax_grid_points(const at::Tensor& lo, const at::Tensor& hi, const GridRule& rule);

/// Throws as minmax_grid_point does unless all scales are finite. Waits for the device.
void check_scales(const at::Tensor& scales, const at::Tensor& lo, const at::Tensor& hi, const GridRule& rule);

/// What a table [n_groups, N] holds for each entry of the weight, [N, K].
at::Tensor of_entries(const at::Tensor& table, int64_t group_size, int64_t k);

/// Waits for the device.
Grid minmax_grid_on_device(const at::Tensor& weight, const Plan& plan);
at::Tensor round_to_grid_on_device(const at::Tensor& weight, const Grid& grid);
at::Tensor dequantize_codes_on_device(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros,
                                      int64_t group_size, at::ScalarType dtype);

}  // namespace gptq
