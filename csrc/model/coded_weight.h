#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace gptq {

/// A quantized weight w[N,K] as numbers: w[:, order[k]] = (codes[:, k] - zero) · scale of k's group. What every stored
/// format can be turned into, and back.
struct CodedWeight {
  int64_t bits = 4;
  int64_t group_size = 128;               ///< columns per group, the last may be short; -1: one group per row
  at::Tensor codes;                       ///< u8 [N, K], columns in the order of the groups
  at::Tensor scales;                      ///< f16 [n_groups, N]
  at::Tensor zeros;                       ///< u8 [n_groups, N]
  std::optional<at::Tensor> input_order;  ///< i32 [K], a permutation, see linear_w4; absent: columns as stored
};

/// What takes the place of one linear's weight in a saved checkpoint.
struct QuantizedTensors {
  int64_t bits = 4;
  int64_t group_size = 128;               ///< columns per group, -1: one group per row
  at::Tensor packed;                      ///< see pack_w4, and pack_w8 with more than 4 bits
  at::Tensor scales;                      ///< f16 [n_groups, N]
  std::optional<at::Tensor> zeros;        ///< u8 [n_groups, N]; absent: zero_of_none everywhere
  std::optional<at::Tensor> input_order;  ///< i32 [K], see linear_w4; absent means none
  std::optional<at::Tensor> bias;         ///< f32 [N], if it changed
};

/// Number of groups of a row of k columns.
int64_t group_count(int64_t k, int64_t group_size);

/// The weight as linear_w4 takes it, or linear_w8 with more than 4 bits. Zeros that are all zero_of_none are left out.
QuantizedTensors pack_weight(const CodedWeight& weight);

/// The inverse of pack_weight, to the same bits.
/// @param weight with packed and scales
/// @param n rows, k columns of the linear's weight
/// @throws c10::Error naming the tensor that does not fit
CodedWeight unpack_weight(const QuantizedTensors& weight, int64_t n, int64_t k);

}  // namespace gptq
