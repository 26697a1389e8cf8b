// What gptq::linear_w4 and linear_w8 do with their arguments on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "linear_w4.h"

namespace gptq {

/// Checks everything but values: dtypes, devices and shapes, which may be symbolic.
/// @param bits 4 for linear_w4, 8 for linear_w8
void check_linear_w4(int bits, const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute);

/// Throws, in the name of op, unless compute is "exact", "bf16" or "int8".
void check_linear_compute(const char* op, std::string_view compute);

/// How many digits the activations have: 1 for "int8", 2 for "bf16" and for 16-bit inputs, 3 for f32.
int linear_w4_digits(at::ScalarType dtype, std::string_view compute);

/// The arguments of one call, checked, as the kernels of any device want them: operands point into the tensors.
struct LinearW4Arguments {
  LinearW4Operands operands = {};
  at::Tensor x, packed, scales, zeros, order, bias;
  at::Tensor y;  ///< to be written
};

/// @param bits 4 for linear_w4, 8 for linear_w8
/// @throws c10::Error where check_linear_w4 does
LinearW4Arguments prepare_linear_w4(int bits, const at::Tensor& input, const at::Tensor& packed,
                                    const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& input_order,
                                    int64_t group_size, std::string_view compute);

/// The activation groups of a row of k columns, in order.
std::vector<LinearW4Group> linear_w4_groups(int64_t k, int64_t group_size);

}  // namespace gptq
