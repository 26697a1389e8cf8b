#pragma once

#include <cstdint>

namespace gptq {

/// Rows computed together, one in each vector lane: 256 bytes of each column.
template <typename T>
inline constexpr int64_t kStripRows = 256 / static_cast<int64_t>(sizeof(T));

/// Columns that `pull` sums side by side at its widest: blocks are cut into tiles of as many.
inline constexpr int64_t kTileColumns = 6;

/// targets[c] += Σ_{j in [from, to)} columns[j] · matrix[c][j] for c in [0, count), j ascending, one fused product and
/// sum at a time, so that the bits do not depend on how the work is blocked. They are the same on every processor that
/// has fused multiply-add.
/// @param matrix row c starts at matrix + c * stride
/// @param columns [to][kStripRows], aligned to 64 bytes
/// @param targets [count][kStripRows], aligned to 64 bytes
void pull(const float* matrix, int64_t stride, const float* columns, int64_t from, int64_t to, int64_t count,
          float* targets);
void pull(const double* matrix, int64_t stride, const double* columns, int64_t from, int64_t to, int64_t count,
          double* targets);

/// Two values rounded to bfloat16, to nearest even: the first in the upper half.
using Bf16Pair = uint32_t;

/// pull of values in pairs of neighbouring columns, twice as fast where the processor has AVX512-BF16, with the bits of
/// pull of the rounded values. Strides, from and to count pairs.
void pull(const Bf16Pair* matrix, int64_t stride, const Bf16Pair* columns, int64_t from, int64_t to, int64_t count,
          float* targets);

/// pairs[i] = (first[i * step], second[i * step]) for i in [0, count); finite values.
void round_to_pairs(const float* first, const float* second, int64_t count, int64_t step, Bf16Pair* pairs);

}  // namespace gptq
