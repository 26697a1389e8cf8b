#pragma once

#include <cstdint>

namespace gptq {

/// Rows swept together: two 64-byte vectors.
template <typename T>
inline constexpr int64_t kStripRows = 128 / static_cast<int64_t>(sizeof(T));

/// The arrays of one strip of rows. Everything per column is [column][kStripRows], aligned to 64 bytes, and columns
/// are in sweep order. M is Factor::multipliers: row k starts at multipliers + k * n_columns.
template <typename T>
struct SweepStrip {
  int64_t n_columns;
  const T* multipliers;
  const int64_t* group;  ///< [n_columns]
  T* weights;            ///< in: the weight; out: the code, column by column
  T* errors;             ///< weight - quantized weight of the columns swept so far
  const T* scales;       ///< [n_groups][kStripRows]
  const T* zeros;        ///< [n_groups][kStripRows]
  T max_code;
};

/// targets[c] += Σ_{j in [from, to)} errors[j] · M_j,first+c for c in [0, count): one product and one sum at a time, j
/// ascending, so that the bits do not depend on how the columns are blocked.
void pull_errors(const SweepStrip<float>& strip, int64_t from, int64_t to, int64_t first, int64_t count,
                 float* targets);
void pull_errors(const SweepStrip<double>& strip, int64_t from, int64_t to, int64_t first, int64_t count,
                 double* targets);

/// Quantizes columns [first, first + count), whose targets hold the errors of all columns before first.
void sweep_block(const SweepStrip<float>& strip, int64_t first, int64_t count, float* targets);
void sweep_block(const SweepStrip<double>& strip, int64_t first, int64_t count, double* targets);

}  // namespace gptq
