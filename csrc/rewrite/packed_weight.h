#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace gptq::rewrite {

/// Bits that a code takes once it is packed: 4, and 8 for codes of more than 4 bits.
constexpr int64_t packed_bits(int64_t bits) {
  return bits <= 4 ? 4 : 8;
}

/// What every zero point is where none are stored.
constexpr int64_t zero_of_none(int64_t bits) {
  return int64_t{1} << (packed_bits(bits) - 1);
}

/// A quantized weight as linear_w4 takes it, or linear_w8 with more than 4 bits.
struct PackedWeight {
  at::Tensor packed;  ///< see pack_w4 and pack_w8
  at::Tensor scales;  ///< f16 [n_groups, N]
  at::Tensor zeros;   ///< u8 [n_groups, N]; undefined if every one is zero_of_none
};

/// @param codes u8 [N, K], columns in the order of the groups
/// @param scales f16 [n_groups, N]
/// @param zeros u8 [n_groups, N]
/// @param bits of the codes, 2 to 8
PackedWeight pack_weight(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros, int64_t bits);

}  // namespace gptq::rewrite
