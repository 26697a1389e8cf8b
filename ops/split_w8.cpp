#include "gptq/split_w8.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/isfinite.h>
#include <torch/library.h>

#include <tuple>

namespace gptq {
namespace {

using Tensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

void check_matrix(const at::Tensor& tensor, const char* name, at::ScalarType dtype) {
  TORCH_CHECK(tensor.scalar_type() == dtype, "split_w8: ", name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.dim() == 2, "split_w8: ", name, " must have two dimensions, got ", tensor.sizes());
}

at::Tensor halves(const at::Tensor& values, int64_t dimension) {
  return at::cat({values.bitwise_right_shift(4), values.bitwise_and(15)}, dimension);
}

Tensors split_w8_op(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros, int64_t group_size) {
  check_matrix(codes, "codes", at::kByte);
  check_matrix(scales, "scales", at::kHalf);
  check_matrix(zeros, "zeros", at::kByte);
  const int64_t k = codes.size(1), width = group_size == -1 ? k : group_size;
  TORCH_CHECK(group_size == -1 || (group_size >= 1 && k % group_size == 0),
              "split_w8: group_size must be -1 or divide the ", k, " columns of codes, got ", group_size);
  const at::DimVector shape{width == 0 ? 0 : k / width, codes.size(0)};
  TORCH_CHECK(scales.sizes() == shape, "split_w8: scales must be [n_groups, N] = ", shape, ", got ", scales.sizes());
  TORCH_CHECK(zeros.sizes() == shape, "split_w8: zeros must be [n_groups, N] = ", shape, ", got ", zeros.sizes());
  const at::Tensor high = scales.mul(16);
  TORCH_CHECK(high.isfinite().all().item<bool>(),
              "split_w8: scales must be at most 4094, since 16 times as much is "
              "stored in float16, got ",
              scales.abs().max().item<double>());
  return {halves(codes, 1), at::cat({high, scales}), halves(zeros, 0)};
}

}  // namespace

SplitW8 split_w8(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros, int64_t group_size) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gptq::split_w8", "").typed<decltype(split_w8_op)>();
  auto [split_codes, split_scales, split_zeros] = op.call(codes, scales, zeros, group_size);
  return {std::move(split_codes), std::move(split_scales), std::move(split_zeros)};
}

TORCH_LIBRARY_IMPL(gptq, CompositeImplicitAutograd, m) {
  m.impl("split_w8", split_w8_op);
}

}  // namespace gptq
