// Argument checks of gptq::linear_w4 and linear_w8, shared by all devices.
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

/// How many digits the activations have: 1 for "int8", 2 for "bf16" and for 16-bit inputs, 3 for f32.
int linear_w4_digits(at::ScalarType dtype, std::string_view compute);

/// What the kernels call an input's dtype, which check_linear_w4 has let through.
LinearW4Type linear_w4_type(at::ScalarType dtype);

/// The activation groups of a row of k columns, in order.
std::vector<LinearW4Group> linear_w4_groups(int64_t k, int64_t group_size);

}  // namespace gptq
