#pragma once

#include <cstdint>

#include "quant/pull_kernel.h"

namespace gptq {

/// The columns [first, first + width) of -L in one strip of rows. Every column before first is done; these hold what is
/// left of A once those have been subtracted.
template <typename T>
struct CholeskyPanel {
  T* strip;  ///< [n_columns][kStripRows], aligned to 64 bytes: rows of -L, or of what is left of A
  T* lower;  ///< [n_columns][n_columns]: L, row by row
  int64_t n_columns;
  int64_t first;
  int64_t width;  ///< at most kStripRows
};

/// Factorises the strip on the diagonal, whose first row is row first, and writes its columns to lower too.
/// @return false if a pivot is not positive and finite
bool factor_corner(const CholeskyPanel<float>& panel);
bool factor_corner(const CholeskyPanel<double>& panel);

/// Solves for a strip below the diagonal once the corner is in lower.
void solve_panel(const CholeskyPanel<float>& panel);
void solve_panel(const CholeskyPanel<double>& panel);

}  // namespace gptq
