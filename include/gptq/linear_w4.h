#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace gptq {

/// y = x · dequantize(packed)ᵀ + bias, computed from the packed 4-bit weight.
///
/// The arithmetic is integer. Per token and group of at most 128 columns the input is written as a fixed-point number
/// of one, two or three int8 digits relative to the group's largest magnitude, and every digit's product with the codes
/// is summed exactly; the groups are then added up in f32 in one fixed order. (The Ozaki scheme, applied to one
/// operand.) The result therefore has the same bits on every instruction set, for every number of threads and for a row
/// alone as in a batch. A row that holds a NaN or an infinity comes out as NaN in every column.
///
/// On the CPU the best instruction set of the machine is used. The environment variable GPTQ_CPU_ISA (scalar, avx2,
/// avxvnni, avx512vnni or amx) forces one, and the operator throws where the machine lacks it.
///
/// On CUDA the digits are multiplied by int8 tensor cores, on the current stream and without waiting for it; values of
/// input_order are not checked there, and one outside 0..K-1 makes NaN. "exact" and "int8" have the bits of the CPU for
/// any number of rows, and so has "bf16" below 512 rows or for f32 input. From 512 rows of bf16 or f16 on, "bf16"
/// rounds the weight to the input's dtype, a part of it at a time, and multiplies by cuBLAS: as accurate as a dense
/// linear of that dtype, with other bits, unless at::globalContext().deterministicAlgorithms(). K is at most 2^30
/// there.
///
/// Inference only: backward through the result throws.
///
/// @param input f32, bf16 or f16 [..., K]; any strides
/// @param packed u8 [ceil(N/16), ceil(K/8), 64], see pack_w4
/// @param scales f16 [n_groups, N], n_groups = ceil(K / group_size)
/// @param zeros u8 [n_groups, N]; absent means 8 everywhere
/// @param bias f32, bf16 or f16 [N]
/// @param input_order i32 [K]: column k of the weight multiplies input[..., input_order[k]]; for imported act-order
///        checkpoints only
/// @param group_size columns per group, at least 1; -1 is one group per row; the last group may be short
/// @param compute "exact": three digits for f32 input, two for bf16 and f16, 2^-16 of the group's maximum and below the
///        rounding of the output. "bf16": two digits whatever the input. "int8": one digit, an error near 1 %
/// @return [..., N] in the input's dtype
/// @throws c10::Error for a dtype, shape, device or option other than these, and for an input_order outside 0..K-1;
///         the message names the argument, what is required and what was given
at::Tensor linear_w4(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size,
                     std::string_view compute = "exact");

/// As linear_w4, for codes of 8 bits: the same arithmetic, promises and errors.
///
/// @param packed u8 [ceil(N/16), ceil(K/8), 128], see pack_w8
/// @param zeros u8 [n_groups, N]; absent means 128 everywhere
at::Tensor linear_w8(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size,
                     std::string_view compute = "exact");

}  // namespace gptq
