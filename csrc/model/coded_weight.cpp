#include "model/coded_weight.h"

#include <ATen/ATen.h>
#include <gptq/pack_w4.h>

#include "rewrite/packed_weight.h"

namespace gptq {

namespace {

// The one tensor that split_w8 made two halves of, along the dimension.
at::Tensor joined(const at::Tensor& halves, int64_t dimension) {
  const auto parts = halves.chunk(2, dimension);
  return parts[0].mul(16).add_(parts[1]);
}

void join_planes(CodedWeight& weight) {
  weight.codes = joined(weight.codes, 1).contiguous();
  weight.zeros = joined(weight.zeros, 0).contiguous();
  const auto scales = weight.scales.chunk(2);
  TORCH_CHECK((scales[1] * 16).equal(scales[0]),
              "scales must be two halves, the first 16 times the second, with more than 4 bits, are not");
  weight.scales = scales[1].contiguous();
  if (!weight.input_order) return;
  const auto orders = weight.input_order->chunk(2);
  TORCH_CHECK(orders[0].equal(orders[1]), "input_order must be the same twice with more than 4 bits, is not");
  weight.input_order = orders[0].contiguous();
}

}  // namespace

int64_t group_count(int64_t k, int64_t group_size) {
  return group_size == -1 ? 1 : (k - 1) / group_size + 1;
}

QuantizedTensors pack_weight(const CodedWeight& weight) {
  QuantizedTensors result;
  result.bits = weight.bits;
  result.group_size = weight.group_size;
  const rewrite::PackedWeight packed =
      rewrite::pack_weight(weight.codes, weight.scales, weight.zeros, weight.input_order.value_or(at::Tensor()),
                           weight.bits, weight.group_size);
  result.packed = packed.packed;
  result.scales = packed.scales;
  if (packed.zeros.defined()) result.zeros = packed.zeros;
  if (packed.input_order.defined()) result.input_order = packed.input_order;
  return result;
}

CodedWeight unpack_weight(const QuantizedTensors& weight, int64_t n, int64_t k) {
  TORCH_CHECK(weight.packed.defined() && weight.scales.defined(), "packed and scales must be there, are not");
  const bool split = weight.bits > 4;
  CodedWeight result;
  result.bits = weight.bits;
  result.group_size = weight.group_size;
  result.codes = unpack_w4(weight.packed, n, split ? 2 * k : k);
  result.scales = weight.scales;
  const at::IntArrayRef shape = weight.scales.sizes();
  const int64_t groups = group_count(k, weight.group_size) * (split ? 2 : 1);
  TORCH_CHECK(weight.scales.scalar_type() == at::kHalf && shape == at::IntArrayRef({groups, n}),
              "scales must be f16 [n_groups, N] = [", groups, ", ", n, "], got ", shape);
  result.zeros = weight.zeros.value_or(at::full({groups, n}, rewrite::kZeroOfNone, at::kByte));
  TORCH_CHECK(result.zeros.scalar_type() == at::kByte && result.zeros.sizes() == shape,
              "zeros must be u8 [n_groups, N] = ", shape, ", got ", result.zeros.sizes());
  result.input_order = weight.input_order;
  if (split) join_planes(result);
  return result;
}

}  // namespace gptq
