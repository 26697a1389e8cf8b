#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "model/coded_weight.h"

namespace gptq {

/// A linear as the format "pack-quantized" of compressed-tensors stores it, which vLLM reads. Codes and zero points are
/// streams of `bits`-wide fields without padding between them, the lowest bit of the first word first; what the package
/// calls the integer q is the field less 2^(bits-1). Rows are outputs, also for GPT-2, whose float weights lie the
/// other way round.
struct CompressedTensors {
  at::Tensor packed;                     ///< weight_packed, i32 [N, ceil(K bits / 32)]: the codes, packed along K
  at::Tensor scale;                      ///< weight_scale, [N, n_groups], f16, or what f16 holds exactly
  std::optional<at::Tensor> zero_point;  ///< weight_zero_point, i32 [ceil(N bits / 32), n_groups], packed along N
  at::Tensor shape;                      ///< weight_shape, i64 or i32 [2]: N, K
  std::optional<at::Tensor> g_idx;       ///< weight_g_idx, i32 [K]: the group of each column; absent: k / group_size
};

/// What the settings of a checkpoint say of one linear.
struct CompressedTensorsLayout {
  int64_t bits = 4;          ///< 2 to 8
  int64_t group_size = 128;  ///< -1: one group per row; otherwise it divides K
  bool symmetric = true;     ///< without zero_point: every one is 2^(bits-1)
};

/// That the format can hold such a weight.
/// @param name of the linear, for the error
/// @throws c10::Error "<name>: <what> must be <requirement> in the compressed-tensors format, got <value>"
void check_compressed_tensors_fits(const std::string& name, int64_t bits, int64_t group_size, int64_t k);

/// The weight of such a linear. Columns are put in the order of their groups, as they are stored within one.
/// @param n, k rows and columns that the model wants
/// @param name of the linear, for errors
/// @throws c10::Error "<name>.<tensor> must be <requirement>, got <value>"
CodedWeight unpack_compressed_tensors(const CompressedTensors& tensors, const CompressedTensorsLayout& layout,
                                      int64_t n, int64_t k, const std::string& name);

/// The inverse of unpack_compressed_tensors, without g_idx, which the package no longer reads. The order of columns
/// within a group is not kept, it has no meaning.
/// @param symmetric leaves out zero_point; every zero point has to be 2^(bits-1) then
/// @throws c10::Error where check_compressed_tensors_fits would, where the columns of a group do not lie together, and
///         for codes or zeros of more than `bits` bits
CompressedTensors pack_compressed_tensors(const CodedWeight& weight, bool symmetric, const std::string& name);

}  // namespace gptq
