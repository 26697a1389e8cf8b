#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace gptq {

/// A weight of 5 to 8 bits as one of 4 bits with twice as many columns.
struct SplitW8 {
  at::Tensor codes;   ///< u8 [N, 2K]: the high halves of the codes, then the low ones
  at::Tensor scales;  ///< f16 [2 n_groups, N]: 16 scale, then scale
  at::Tensor zeros;   ///< u8 [2 n_groups, N]: the high halves of the zero points, then the low ones
};

/// (code - zero) · scale = (code / 16 - zero / 16) · 16 scale + (code % 16 - zero % 16) · scale, without a rounding, so
/// that linear_w4 runs codes of up to 8 bits: x · wᵀ = [x, x] · w'ᵀ, with the same number of columns per group.
///
/// @param codes u8 [N, K]
/// @param scales f16 [n_groups, N]
/// @param zeros u8 [n_groups, N]
/// @param group_size columns per group, dividing K, or -1: one group per row, which is K columns per group of the
/// result
/// @throws c10::Error for another dtype or shape, and for a scale so large that 16 times as much is no f16
SplitW8 split_w8(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros, int64_t group_size);

}  // namespace gptq
