#include "pack_w4_any.h"

#include <ATen/ATen.h>

#include "linear_w4.h"

namespace gptq {

// A byte of an atom of 4-bit codes holds a column of the first four in its low half and one of the last four in its
// high half; one of 8-bit codes has the first four columns of every row before the last four.
at::Tensor pack_any(int bits, const at::Tensor& codes) {
  const int64_t n = codes.size(0), k = codes.size(1);
  const int64_t blocks = ceil_div(n, kAtomRows), atoms = ceil_div(k, kAtomColumns);
  const at::Tensor padded = at::constant_pad_nd(codes, {0, atoms * kAtomColumns - k, 0, blocks * kAtomRows - n});
  const at::Tensor halves = padded.view({blocks, kAtomRows, atoms, 2, kAtomColumns / 2}).permute({0, 2, 3, 1, 4});
  const at::Tensor packed =
      bits == 8 ? halves : halves.select(2, 0).bitwise_or(halves.select(2, 1).bitwise_left_shift(4));
  return packed.reshape({blocks, atoms, atom_bytes(bits)});
}

at::Tensor unpack_any(int bits, const at::Tensor& packed, int64_t n, int64_t k) {
  const int64_t blocks = packed.size(0), atoms = packed.size(1);
  const at::Tensor bytes = packed.reshape({blocks, atoms, bits / 4, kAtomRows, kAtomColumns / 2});
  const at::Tensor halves =
      bits == 8 ? bytes : at::cat({bytes.bitwise_and(15), bytes.bitwise_right_shift(4)}, /*dim=*/2);
  const at::Tensor codes = halves.permute({0, 3, 1, 2, 4}).reshape({blocks * kAtomRows, atoms * kAtomColumns});
  return codes.narrow(0, 0, n).narrow(1, 0, k).contiguous();
}

at::Tensor dequantize_any(int bits, const at::Tensor& packed, const at::Tensor& scales,
                          const std::optional<at::Tensor>& zeros, int64_t k, int64_t width) {
  const auto per_column = [&](const at::Tensor& table) {
    return table.to(at::kFloat).repeat_interleave(width, 0, table.size(0) * width).narrow(0, 0, k).t();
  };
  const at::Tensor codes = unpack_any(bits, packed, scales.size(1), k).to(at::kFloat);
  const at::Tensor differences =
      zeros ? codes.sub(per_column(*zeros)) : codes.sub(static_cast<double>(middle_code(bits)));
  return differences.mul(per_column(scales)).contiguous();
}

}  // namespace gptq
