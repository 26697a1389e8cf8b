#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

#include "model/coded_weight.h"

/// What the checkpoint formats that pack codes into words of 32 bits have in common.
namespace gptq {

/// Bits of a word.
inline constexpr int64_t kWordBits = 32;

/// The largest code of so many bits.
uint32_t field_mask(int64_t bits);

/// Words that a stream of so many fields takes.
int64_t word_count(int64_t fields, int64_t bits);

/// The first fields of streams of `bits`-wide fields, the lowest bit of the first word first. A field may straddle two
/// words.
/// @param words i32 [word_count(fields, bits), C], a stream down each column
/// @return u8 [fields, C]
at::Tensor unpack_fields(const at::Tensor& words, int64_t fields, int64_t bits);

/// The inverse of unpack_fields. Bits of the last word that no field fills are 0.
/// @param values u8 [F, C], below 2^bits
/// @return i32 [word_count(F, bits), C]
at::Tensor pack_fields(const at::Tensor& values, int64_t bits);

/// The group of each column where they lie in order, i32 [K].
at::Tensor groups_in_order(int64_t k, int64_t group_size);

/// The columns in the order of their groups, as they are stored within one.
/// @param g_idx i32 [K], the group of each column
/// @param name of the tensor, for errors
/// @return i32 [K], see CodedWeight::input_order; absent where they lie so already
/// @throws c10::Error for a group outside 0..groups-1, and for one that is not group_size columns wide (but the last)
std::optional<at::Tensor> order_of_groups(const at::Tensor& g_idx, int64_t group_size, int64_t groups,
                                          const std::string& name);

/// A weight's codes with the columns where the linear has them.
struct PlacedCodes {
  at::Tensor codes;   ///< u8 [K, N]
  at::Tensor groups;  ///< i32 [K], the group of each column
};

/// @param name of the linear, for errors
/// @throws c10::Error where codes or zeros have more than the weight's bits, and where input_order is no permutation
PlacedCodes place_codes(const CodedWeight& weight, const std::string& name);

/// @throws c10::Error "<name> must be <dtype>, got <dtype>" and the same of the shape
void check_tensor(const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape, const std::string& name);

/// Scales as f16.
/// @throws c10::Error where they have another shape, are not finite, or f16 would round one
at::Tensor checked_scales(const at::Tensor& scales, at::IntArrayRef shape, const std::string& name);

}  // namespace gptq
