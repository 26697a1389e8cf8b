// pack_w4 and its kin in operations of ATen, for devices that have no kernel of their own.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace gptq {

/// @param bits 4 or 8; values that do not fit are not looked for, since that would wait for the device
at::Tensor pack_any(int bits, const at::Tensor& codes);
at::Tensor unpack_any(int bits, const at::Tensor& packed, int64_t n, int64_t k);
/// @param width columns per group, at least 1
at::Tensor dequantize_any(int bits, const at::Tensor& packed, const at::Tensor& scales,
                          const std::optional<at::Tensor>& zeros, int64_t k, int64_t width);

}  // namespace gptq
