#include "rewrite/packed_weight.h"

#include <ATen/ATen.h>
#include <gptq/pack_w4.h>

namespace gptq::rewrite {

PackedWeight pack_weight(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros, int64_t bits) {
  const bool needs_zeros = !zeros.eq(zero_of_none(bits)).all().item<bool>();
  return {packed_bits(bits) == 8 ? pack_w8(codes) : pack_w4(codes), scales, needs_zeros ? zeros : at::Tensor()};
}

}  // namespace gptq::rewrite
