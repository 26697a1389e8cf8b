#pragma once

#include <cstdint>

#include "quant/pull_kernel.h"

namespace gptq {

/// One group of a strip of rows. Everything per column is [column][kStripRows], aligned to 64 bytes.
template <typename T>
struct SearchedGroup {
  int64_t n_columns;
  const T* weights;
  const T* importance;  ///< [n_columns], at least 0
  T max_code;
  bool symmetric;
  T* scales;  ///< [kStripRows]: in: those of the min/max grid; out: a float16 value, of either sign if symmetric
  T* zeros;   ///< [kStripRows]: the same for zero points, fixed if symmetric
};

/// Looks for the scales and zero points that make Σ importance (w - (code - zero) scale)² small: over a fine grid of
/// clipped ranges, then by turns of rounding and least squares. The result is never worse than what was there.
void search_scales(const SearchedGroup<float>& group);
void search_scales(const SearchedGroup<double>& group);

}  // namespace gptq
