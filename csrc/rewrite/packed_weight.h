#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace gptq::rewrite {

/// What every zero point is where none are stored.
inline constexpr int64_t kZeroOfNone = 8;

/// A quantized weight as linear_w4 takes it; with more than 4 bits as split_w8 makes it, so that C = 2K instead of K.
struct PackedWeight {
  at::Tensor packed;       ///< u8 [ceil(N/16), ceil(C/8), 64]
  at::Tensor scales;       ///< f16 [n_groups, N], twice as many rows with more than 4 bits
  at::Tensor zeros;        ///< u8 in the shape of scales; undefined if every one is 8
  at::Tensor input_order;  ///< i32 [C]; undefined: none
};

/// Whether linear_w4 can run such a weight: with more than 4 bits the group size has to divide the inputs, or be -1.
bool can_pack(int64_t bits, int64_t group_size, int64_t in_features);

/// @param codes u8 [N, K], columns in the order of the groups
/// @param scales f16 [n_groups, N]
/// @param zeros u8 [n_groups, N]
/// @param input_order i32 [K], see linear_w4; undefined: none
/// @throws c10::Error where can_pack is false, and with more than 4 bits where a scale is above 4094
PackedWeight pack_weight(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros,
                         const at::Tensor& input_order, int64_t bits, int64_t group_size);

}  // namespace gptq::rewrite
