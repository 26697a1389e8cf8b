#pragma once

#include <ATen/core/Tensor.h>

namespace gptq {

/// gram += XᵀX in the upper triangle of blocks; what lies below the diagonal is unspecified.
/// @param gram f32 [K, K]
/// @param rows f32 [n, K]
void add_gram(at::Tensor& gram, const at::Tensor& rows);

/// The whole symmetric matrix from its upper triangle, times scale.
at::Tensor mirrored(const at::Tensor& gram, double scale);

}  // namespace gptq
