#pragma once

#include <ATen/core/Tensor.h>

namespace gptq {

/// gram += XᵀX in the upper triangle of blocks; what lies below the diagonal is unspecified.
/// @param gram f32 [K, K]
/// @param columns f32 [K, n], contiguous: Xᵀ
void add_gram(at::Tensor& gram, const at::Tensor& columns);

/// The transpose of an f32 matrix that is contiguous, as a contiguous one.
at::Tensor transposed(const at::Tensor& matrix);

/// Sums over the rows of each column, f64 [K].
struct ColumnSums {
  at::Tensor values;
  at::Tensor squares;
};

/// @param rows f32 [n, K], contiguous
/// @param weights f32 [n]: how much each row counts; undefined: 1
ColumnSums column_sums(const at::Tensor& rows, const at::Tensor& weights = {});

/// The whole symmetric matrix from its upper triangle, times scale.
at::Tensor mirrored(const at::Tensor& gram, double scale);

}  // namespace gptq
