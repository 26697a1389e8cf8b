#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "model/coded_weight.h"

namespace gptq {

/// How qzeros holds a zero point.
enum class GptqZeros {
  kPlain,          ///< checkpoint_format "gptq_v2": as it is
  kLessOne,        ///< "gptq": less one, modulo 2^bits, each field by itself
  kLessOneByWord,  ///< "gptq" from gptqmodel with 2, 4 or 8 bits: the word of zero points less the word of ones, so
                   ///< that a zero point 0 borrows from the next field; with 3 bits the same as kLessOne
};

/// A linear as GPTQModel, AutoGPTQ and transformers store it. Every packed tensor is a stream of `bits`-wide fields,
/// the lowest bit of the first word first; with 3 bits, 32 fields take three words and two of them straddle words.
struct GptqTensors {
  at::Tensor qweight;               ///< i32 [K bits / 32, N]: the codes, packed along K
  at::Tensor qzeros;                ///< i32 [n_groups, N bits / 32]: the zero points, packed along N
  at::Tensor scales;                ///< [n_groups, N], f16, or floating point that f16 holds exactly
  std::optional<at::Tensor> g_idx;  ///< i32 [K]: the group of each column; absent: column k is in group k / group_size
};

/// What the settings of a checkpoint say of one linear.
struct GptqLayout {
  int64_t bits = 4;          ///< 2, 3, 4 or 8
  int64_t group_size = 128;  ///< -1: one group per row
  GptqZeros zeros = GptqZeros::kLessOne;
  /// Every zero point is 2^(bits-1). Zero points of the other version than `zeros` says are then recognised.
  bool symmetric = false;
};

/// That the format can hold such a weight: bits, group size, and rows and columns that fill whole words.
/// @param name of the linear, for the error
/// @throws c10::Error "<name>: <what> must be <requirement> in the gptq format, got <value>"
void check_gptq_fits(const std::string& name, int64_t bits, int64_t group_size, int64_t n, int64_t k);

/// The weight of such a linear. Columns are put in the order of their groups, as they are stored within one.
/// @param name of the linear, for errors
/// @throws c10::Error "<name>.<tensor> must be <requirement>, got <value>" for another dtype or shape, for a g_idx
///         outside 0..n_groups-1, and for groups that are not group_size columns wide (but the last)
CodedWeight unpack_gptq(const GptqTensors& tensors, const GptqLayout& layout, const std::string& name);

/// The inverse of unpack_gptq. g_idx is always there. The order of columns within a group is not kept, it has no
/// meaning.
/// @param plain_zeros version 2; otherwise version 1, each field by itself
/// @throws c10::Error where check_gptq_fits would, and for codes or zeros of more than `bits` bits
GptqTensors pack_gptq(const CodedWeight& weight, bool plain_zeros, const std::string& name);

}  // namespace gptq
