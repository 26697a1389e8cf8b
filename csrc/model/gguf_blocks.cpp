#include "model/gguf_blocks.h"

#include <ATen/ATen.h>

#include "model/packed_words.h"

namespace gptq {

namespace {

constexpr int64_t kMiddle4 = 8;

// i64 [K / 32], the group of each block of columns.
at::Tensor groups_of_blocks(const at::Tensor& groups_of_columns, const std::string& name) {
  const at::Tensor blocks = groups_of_columns.to(at::kLong).view({-1, kGgufBlockSize});
  const at::Tensor first = blocks.select(1, 0);
  const at::Tensor mixed = blocks.ne(first.unsqueeze(1));
  if (mixed.any().item<bool>()) {
    const auto block = mixed.any(1).to(at::kByte).argmax().item<int64_t>();
    const auto column = mixed[block].to(at::kByte).argmax().item<int64_t>();
    const int64_t begin = block * kGgufBlockSize;
    TORCH_CHECK(false, name, ": columns ", begin, "..", begin + kGgufBlockSize - 1,
                " must be of one group in a GGUF file, column ", begin, " is of group ", first[block].item<int64_t>(),
                " and column ", begin + column, " of group ", blocks[block][column].item<int64_t>());
  }
  return first.contiguous();
}

// [n_groups, N] to [N, K / 32], a value for each block.
at::Tensor for_blocks(const at::Tensor& of_groups, const at::Tensor& groups) {
  return of_groups.index_select(0, groups).t().contiguous();
}

// f32 [n_groups, N], what code 0 stands for.
at::Tensor minima_of(const CodedWeight& weight) {
  return weight.scales.to(at::kFloat).mul(weight.zeros.to(at::kFloat)).neg_();
}

// i16 [N, K / 32, 32], code less zero point.
at::Tensor centered(const CodedWeight& weight, const at::Tensor& codes, const at::Tensor& groups) {
  return codes.view({codes.size(0), -1, kGgufBlockSize})
      .to(at::kShort)
      .sub_(for_blocks(weight.zeros, groups).unsqueeze(2).to(at::kShort));
}

void check_minima(const CodedWeight& weight, const std::string& name) {
  const at::Tensor minima = minima_of(weight);
  const at::Tensor inexact = minima.to(at::kHalf).to(at::kFloat).ne(minima);
  if (!inexact.any().item<bool>()) return;
  const auto row = inexact.any(0).to(at::kByte).argmax().item<int64_t>();
  const auto group = inexact.select(1, row).to(at::kByte).argmax().item<int64_t>();
  TORCH_CHECK(false, name, ": row ", row, ", group ", group,
              ": -scale * zero point must be an f16 in a GGUF file (Q4_1), has scale ",
              weight.scales[group][row].item<double>(), " and zero point ", weight.zeros[group][row].item<int64_t>());
}

void check_signed_bytes(const CodedWeight& weight, const PlacedCodes& placed, const at::Tensor& groups,
                        const std::string& name) {
  if (weight.zeros.eq(128).all().item<bool>()) return;
  const at::Tensor values = centered(weight, placed.codes.t().contiguous(), groups);
  const at::Tensor outside = values.lt(-128).logical_or_(values.gt(127)).any(2);
  if (!outside.any().item<bool>()) return;
  const auto row = outside.any(1).to(at::kByte).argmax().item<int64_t>();
  const auto block = outside[row].to(at::kByte).argmax().item<int64_t>();
  const auto group = groups[block].item<int64_t>();
  TORCH_CHECK(false, name, ": row ", row, ", group ", group,
              ": codes less the zero point must be in -128..127 in a GGUF file (Q8_0), are in ",
              values[row][block].min().item<int64_t>(), "..", values[row][block].max().item<int64_t>(),
              ", since the zero point is ", weight.zeros[group][row].item<int64_t>());
}

// f16 [...] as its bytes, u8 [..., 2].
at::Tensor bytes_of(const at::Tensor& halves) {
  return halves.contiguous().unsqueeze(-1).view(at::kByte);
}

}  // namespace

void check_gguf_fits(const std::string& name, int64_t bits, int64_t group_size, int64_t k) {
  TORCH_CHECK(bits == 4 || bits == 8, name, ": bits must be 4 or 8 in a GGUF file, got ", bits);
  TORCH_CHECK(k % kGgufBlockSize == 0, name, ": inputs must be a multiple of ", kGgufBlockSize, " in a GGUF file, got ",
              k);
  // A group that is not can still be the only one.
  TORCH_CHECK(group_size == -1 || group_size % kGgufBlockSize == 0 || group_size >= k, name,
              ": group_size must be -1 or a multiple of ", kGgufBlockSize, " in a GGUF file, got ", group_size);
}

GgufType gguf_type_of(const CodedWeight& weight, const std::string& name) {
  check_gguf_fits(name, weight.bits, weight.group_size, weight.codes.size(1));
  const PlacedCodes placed = place_codes(weight, name);
  const at::Tensor groups = groups_of_blocks(placed.groups, name);
  if (weight.bits == 8) {
    check_signed_bytes(weight, placed, groups, name);
    return GgufType::kQ8_0;
  }
  if (weight.zeros.eq(kMiddle4).all().item<bool>()) return GgufType::kQ4_0;
  check_minima(weight, name);
  return GgufType::kQ4_1;
}

at::Tensor gguf_blocks(const CodedWeight& weight, GgufType type, const std::string& name) {
  const PlacedCodes placed = place_codes(weight, name);
  const at::Tensor codes = placed.codes.t().contiguous();
  const at::Tensor groups = groups_of_blocks(placed.groups, name);
  const at::Tensor scales = bytes_of(for_blocks(weight.scales, groups));
  if (type == GgufType::kQ8_0) {
    return at::cat({scales, centered(weight, codes, groups).to(at::kChar).view(at::kByte)}, -1);
  }
  TORCH_CHECK(type == GgufType::kQ4_0 || type == GgufType::kQ4_1, name, ": must be held in Q4_0, Q4_1 or Q8_0, got ",
              gguf_type_name(type));
  // The low nibbles hold the first half of a block, the high ones the second.
  const auto halves = codes.view({codes.size(0), -1, kGgufBlockSize}).chunk(2, 2);
  const at::Tensor nibbles = halves[1].mul(16).add_(halves[0]);
  if (type == GgufType::kQ4_0) return at::cat({scales, nibbles}, -1);
  return at::cat({scales, bytes_of(for_blocks(minima_of(weight).to(at::kHalf), groups)), nibbles}, -1);
}

}  // namespace gptq
