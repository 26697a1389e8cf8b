#include "rewrite/packed_weight.h"

#include <ATen/ATen.h>
#include <gptq/pack_w4.h>
#include <gptq/split_w8.h>

namespace gptq::rewrite {

bool can_pack(int64_t bits, int64_t group_size, int64_t in_features) {
  return bits <= 4 || group_size == -1 || in_features % group_size == 0;
}

PackedWeight pack_weight(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros,
                         const at::Tensor& input_order, int64_t bits, int64_t group_size) {
  if (bits <= 4) {
    const bool needs_zeros = !zeros.eq(kZeroOfNone).all().item<bool>();
    return {pack_w4(codes), scales, needs_zeros ? zeros : at::Tensor(), input_order};
  }
  const SplitW8 split = split_w8(codes, scales, zeros, group_size);
  return {pack_w4(split.codes), split.scales, split.zeros,
          input_order.defined() ? input_order.repeat(2) : at::Tensor()};
}

}  // namespace gptq::rewrite
