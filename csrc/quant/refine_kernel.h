#pragma once

#include <cstdint>

#include "quant/pull_kernel.h"

namespace gptq {

/// One group of columns [first, first + count) of a strip of rows. Everything per column is [column][kStripRows],
/// aligned to 64 bytes.
template <typename T>
struct RefinedGroup {
  int64_t n_columns;
  const T* hessian;  ///< H, [n_columns][n_columns]
  const T* damping;  ///< [n_columns]: what Hd has on its diagonal beyond that of H
  int64_t first;
  int64_t count;
  T max_code;
  T* errors;        ///< [n_columns]: weight - quantized weight
  T* levels;        ///< [n_columns]: code - zero
  T* scales;        ///< [kStripRows], of this group
  const T* zeros;   ///< [kStripRows], of this group
  T* gradients;     ///< [count]: in: E H of the group's columns; overwritten
  T* changes;       ///< [count], scratch
  T* losses;        ///< [kStripRows]: e H eᵀ of each row; what the moves change is added
  bool fit_scales;  ///< whether scales may change
};

/// Moves each code in turn to where the loss e Hd eᵀ of its row is least with all others fixed, then the scale to its
/// least squares value in float16 if that is less. Neither step increases the loss if the gradients are exact.
void refine_group(const RefinedGroup<float>& group);
void refine_group(const RefinedGroup<double>& group);

/// out[j] = values[j] - Σ_{i in [0, rank)} factors[i] · rows[i][j] for j in [0, count), i ascending.
/// @param rows [rank][count]
void subtract_products(const float* values, const float* factors, const float* rows, int64_t rank, int64_t count,
                       float* out);

}  // namespace gptq
