#include "model/coded_weight.h"

#include <ATen/ATen.h>
#include <gptq/pack_w4.h>

#include "rewrite/packed_weight.h"

namespace gptq {

int64_t group_count(int64_t k, int64_t group_size) {
  return group_size == -1 ? 1 : (k - 1) / group_size + 1;
}

QuantizedTensors pack_weight(const CodedWeight& weight) {
  QuantizedTensors result;
  result.bits = weight.bits;
  result.group_size = weight.group_size;
  const rewrite::PackedWeight packed = rewrite::pack_weight(weight.codes, weight.scales, weight.zeros, weight.bits);
  result.packed = packed.packed;
  result.scales = packed.scales;
  if (packed.zeros.defined()) result.zeros = packed.zeros;
  result.input_order = weight.input_order;
  return result;
}

CodedWeight unpack_weight(const QuantizedTensors& weight, int64_t n, int64_t k) {
  TORCH_CHECK(weight.packed.defined() && weight.scales.defined(), "packed and scales must be there, are not");
  CodedWeight result;
  result.bits = weight.bits;
  result.group_size = weight.group_size;
  result.codes =
      rewrite::packed_bits(weight.bits) == 8 ? unpack_w8(weight.packed, n, k) : unpack_w4(weight.packed, n, k);
  result.scales = weight.scales;
  const at::IntArrayRef shape = weight.scales.sizes();
  const int64_t groups = group_count(k, weight.group_size);
  TORCH_CHECK(weight.scales.scalar_type() == at::kHalf && shape == at::IntArrayRef({groups, n}),
              "scales must be f16 [n_groups, N] = [", groups, ", ", n, "], got ", shape);
  result.zeros = weight.zeros.value_or(at::full({groups, n}, rewrite::zero_of_none(weight.bits), at::kByte));
  TORCH_CHECK(result.zeros.scalar_type() == at::kByte && result.zeros.sizes() == shape,
              "zeros must be u8 [n_groups, N] = ", shape, ", got ", result.zeros.sizes());
  result.input_order = weight.input_order;
  return result;
}

}  // namespace gptq
