#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>

#include "quant/pull_kernel.h"

namespace gptq {

/// [N, C] as [n_strips, C, kStripRows]: each strip holds its columns one after another. Rows beyond N hold pad.
template <typename T>
at::Tensor to_strips(const at::Tensor& matrix, double pad) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t n = matrix.size(0), n_strips = (n + rows - 1) / rows;
  const at::Tensor padded = at::constant_pad_nd(matrix, {0, 0, 0, n_strips * rows - n}, pad);
  return padded.view({n_strips, rows, matrix.size(1)}).transpose(1, 2).contiguous();
}

/// The first n rows of what to_strips made, [n, C].
inline at::Tensor from_strips(const at::Tensor& strips, int64_t n) {
  return strips.transpose(1, 2).reshape({-1, strips.size(1)}).narrow(0, 0, n);
}

template <typename T>
T* strip_data(const at::Tensor& strips, int64_t strip) {
  return strips.data_ptr<T>() + strip * strips.size(1) * kStripRows<T>;
}

}  // namespace gptq
