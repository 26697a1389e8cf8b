#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace gptq {

/// A Bᵀ, by oneDNN where torch has it: on some processors it is twice as fast as the library behind at::mm.
/// @param a f32, f64 or bf16 [M, K]
/// @param b [N, K] in the same dtype
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

/// x · wᵀ + bias like at::linear; by oneDNN where that is faster and no gradient is asked for. On the CPU float16, and
/// bfloat16 on processors without instructions for it, are multiplied in float32 and rounded once.
/// @param input any float dtype, [..., K]
/// @param weight [N, K] in the same dtype
/// @param bias [N] or none
at::Tensor linear_dense(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

/// The matrix in bfloat16 if it is f32 and the processor multiplies bfloat16 faster, otherwise as it is.
at::Tensor coarse(const at::Tensor& matrix);

/// A Bᵀ in float32, from factors rounded to bfloat16 where the processor multiplies those faster; otherwise as product.
/// @param a f32 [M, K]
/// @param b f32 [N, K]
at::Tensor coarse_product(const at::Tensor& a, const at::Tensor& b);

}  // namespace gptq
