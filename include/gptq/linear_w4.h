#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace gptq {

/// y = x · dequantize(packed)ᵀ + bias, computed from the packed 4-bit weight.
///
/// @param input f32, bf16 or f16 [..., K]
/// @param packed u8 [ceil(N/16), ceil(K/8), 64], see pack_w4
/// @param scales f16 [n_groups, N], n_groups = ceil(K / group_size)
/// @param zeros u8 [n_groups, N]; absent means 8 everywhere
/// @param bias f32, bf16 or f16 [N]
/// @param input_order i32 [K]: column k of the weight multiplies input[..., input_order[k]]; for imported act-order
///        checkpoints only
/// @param group_size columns per group, at least 1; -1 is one group per row; the last group may be short
/// @param compute "exact" (as accurate as the input's dtype), "bf16" or "int8" (activations rounded to int8 per group)
/// @return [..., N] in the input's dtype
at::Tensor linear_w4(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size,
                     std::string_view compute = "exact");

}  // namespace gptq
