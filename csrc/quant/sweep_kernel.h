#pragma once

#include <cstdint>

#include "quant/pull_kernel.h"

namespace gptq {

/// The arrays of one strip of rows. Everything per column is [column][kStripRows], aligned to 64 bytes. The k-th column
/// swept is column order[k] as stored. M is Factor::multipliers: row k starts at multipliers + k * n_columns.
template <typename T>
struct SweepStrip {
  int64_t n_columns;
  const T* multipliers;
  const T* pivots;       ///< [n_columns], in sweep order
  const T* damping;      ///< [n_columns], in sweep order: what was added to the diagonal of H
  const int64_t* order;  ///< [n_columns]
  int64_t group_size;    ///< columns as stored that share a scale
  const T* weights;      ///< columns as stored
  uint8_t* codes;        ///< columns as stored
  T* errors;             ///< in sweep order: weight - quantized weight of the columns swept so far
  const T* scales;       ///< [n_groups][kStripRows]
  const T* zeros;        ///< [n_groups][kStripRows]
  T max_code;
  T* losses;  ///< [kStripRows]: e H eᵀ of each row, added up column by column
};

/// Quantizes the columns swept from first to first + count, whose targets hold the weights and the errors of all
/// columns before first.
void sweep_block(const SweepStrip<float>& strip, int64_t first, int64_t count, float* targets);
void sweep_block(const SweepStrip<double>& strip, int64_t first, int64_t count, double* targets);

}  // namespace gptq
