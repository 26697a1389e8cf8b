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

}  // namespace gptq
