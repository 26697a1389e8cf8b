#include "model/gptq_format.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

#include "model/packed_words.h"

namespace gptq {

namespace {

constexpr std::array<int64_t, 8> kGroupSizes = {-1, 16, 32, 64, 128, 256, 512, 1024};

bool is_known_width(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

// Every field of a word 1.
uint32_t word_of_ones(int64_t bits) {
  return ~uint32_t{0} / field_mask(bits);
}

// Zero points u8 [n_groups, N].
at::Tensor unpack_zeros(const at::Tensor& qzeros, int64_t n, const GptqLayout& layout) {
  const auto middle = static_cast<int64_t>(uint64_t{1} << (layout.bits - 1));
  const at::Tensor stored = unpack_fields(qzeros.t(), n, layout.bits).t();
  if (layout.symmetric) {
    for (const int64_t version : {middle - 1, middle}) {
      if (stored.eq(version).all().item<bool>()) return at::full_like(stored, middle, at::MemoryFormat::Contiguous);
    }
  }
  if (layout.zeros == GptqZeros::kPlain) return stored.contiguous();
  if (layout.zeros == GptqZeros::kLessOneByWord && kWordBits % layout.bits == 0) {
    at::Tensor words = qzeros.contiguous().clone();
    auto* word = reinterpret_cast<uint32_t*>(words.data_ptr<int32_t>());
    std::for_each(word, word + words.numel(), [&](uint32_t& w) { w += word_of_ones(layout.bits); });
    return unpack_fields(words.t(), n, layout.bits).t().contiguous();
  }
  return stored.add(1).bitwise_and_(static_cast<int64_t>(field_mask(layout.bits))).contiguous();
}

}  // namespace

void check_gptq_fits(const std::string& name, int64_t bits, int64_t group_size, int64_t n, int64_t k) {
  TORCH_CHECK(is_known_width(bits), name, ": bits must be 2, 3, 4 or 8 in the gptq format, got ", bits);
  TORCH_CHECK(std::find(kGroupSizes.begin(), kGroupSizes.end(), group_size) != kGroupSizes.end(), name,
              ": group_size must be -1 or a power of two from 16 to 1024 in the gptq format, since its readers take no "
              "other, got ",
              group_size);
  const auto check_words = [&](const char* what, int64_t size) {
    TORCH_CHECK(size * bits % kWordBits == 0, name, ": ", what,
                " must fill whole words of 32 bits in the gptq format, got ", size, " of ", bits, " bits");
  };
  check_words("outputs", n);
  check_words("inputs", k);
}

CodedWeight unpack_gptq(const GptqTensors& tensors, const GptqLayout& layout, const std::string& name) {
  const int64_t bits = layout.bits;
  TORCH_CHECK(is_known_width(bits), name, ": bits must be 2, 3, 4 or 8, got ", bits);
  TORCH_CHECK(layout.group_size == -1 || layout.group_size > 0, name, ": group_size must be -1 or positive, got ",
              layout.group_size);
  const at::Tensor& qweight = tensors.qweight;
  TORCH_CHECK(qweight.dim() == 2 && qweight.scalar_type() == at::kInt && qweight.size(0) * kWordBits % bits == 0, name,
              ".qweight must be Int [K bits / 32, N] with bits = ", bits, ", got ", qweight.scalar_type(), " ",
              qweight.sizes());
  const int64_t k = qweight.size(0) * kWordBits / bits, n = qweight.size(1);
  const int64_t groups = group_count(k, layout.group_size);
  TORCH_CHECK(n * bits % kWordBits == 0, name, ".qweight must have columns that fill whole words of zero points, got ",
              n, " of ", bits, " bits");
  check_tensor(tensors.qzeros, at::kInt, {groups, n * bits / kWordBits}, name + ".qzeros");
  CodedWeight result;
  result.bits = bits;
  result.group_size = layout.group_size;
  result.scales = checked_scales(tensors.scales, {groups, n}, name + ".scales");
  result.zeros = unpack_zeros(tensors.qzeros, n, layout);
  if (tensors.g_idx) {
    check_tensor(*tensors.g_idx, at::kInt, {k}, name + ".g_idx");
    result.input_order = order_of_groups(*tensors.g_idx, layout.group_size, groups, name + ".g_idx");
  }
  const at::Tensor codes = unpack_fields(qweight, k, bits);
  result.codes = (result.input_order ? codes.index_select(0, *result.input_order) : codes).t().contiguous();
  return result;
}

GptqTensors pack_gptq(const CodedWeight& weight, bool plain_zeros, const std::string& name) {
  const int64_t bits = weight.bits, n = weight.codes.size(0), k = weight.codes.size(1);
  check_gptq_fits(name, bits, weight.group_size, n, k);
  const PlacedCodes placed = place_codes(weight, name);
  GptqTensors result;
  result.qweight = pack_fields(placed.codes, bits);
  result.g_idx = placed.groups;
  result.scales = weight.scales;
  const at::Tensor stored =
      plain_zeros ? weight.zeros : weight.zeros.sub(1).bitwise_and_(static_cast<int64_t>(field_mask(bits)));
  result.qzeros = pack_fields(stored.t(), bits).t().contiguous();
  return result;
}

}  // namespace gptq
