#include "model/gptq_format.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>

namespace gptq {

namespace {

constexpr int64_t kWordBits = 32;
constexpr std::array<int64_t, 8> kGroupSizes = {-1, 16, 32, 64, 128, 256, 512, 1024};
constexpr int64_t kRowsPerTask = 16;

bool is_known_width(int64_t bits) {
  return bits == 2 || bits == 3 || bits == 4 || bits == 8;
}

uint32_t field_mask(int64_t bits) {
  return (uint32_t{1} << bits) - 1;
}

// Every field of a word 1.
uint32_t word_of_ones(int64_t bits) {
  return ~uint32_t{0} / field_mask(bits);
}

// Where field `index` of a stream lies.
struct FieldPlace {
  FieldPlace(int64_t index, int64_t bits)
      : word(index * bits / kWordBits),
        shift(static_cast<int>(index * bits % kWordBits)),
        straddles(shift + bits > kWordBits) {}
  int64_t word;
  int shift;
  bool straddles;  // goes on in the next word
};

// words i32 [W, C], a stream down each column -> u8 [W * 32 / bits, C]
at::Tensor unpack_fields(const at::Tensor& words, int64_t bits) {
  const at::Tensor source = words.contiguous();
  const int64_t columns = source.size(1);
  const int64_t count = source.size(0) * kWordBits / bits;
  at::Tensor result = at::empty({count, columns}, at::kByte);
  const auto* from = reinterpret_cast<const uint32_t*>(source.const_data_ptr<int32_t>());
  auto* to = result.data_ptr<uint8_t>();
  const uint32_t mask = field_mask(bits);
  at::parallel_for(0, count, kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t field = begin; field < end; ++field) {
      const FieldPlace place(field, bits);
      const uint32_t* low = from + place.word * columns;
      uint8_t* out = to + field * columns;
      for (int64_t c = 0; c < columns; ++c) out[c] = static_cast<uint8_t>((low[c] >> place.shift) & mask);
      if (!place.straddles) continue;
      const uint32_t* high = low + columns;
      const int shift = static_cast<int>(kWordBits) - place.shift;
      for (int64_t c = 0; c < columns; ++c) out[c] |= static_cast<uint8_t>((high[c] << shift) & mask);
    }
  });
  return result;
}

// The inverse; values u8 [F, C], F * bits a multiple of 32.
at::Tensor pack_fields(const at::Tensor& values, int64_t bits) {
  const at::Tensor source = values.contiguous();
  const int64_t columns = source.size(1);
  at::Tensor result = at::zeros({source.size(0) * bits / kWordBits, columns}, at::kInt);
  const auto* from = source.const_data_ptr<uint8_t>();
  auto* to = reinterpret_cast<uint32_t*>(result.data_ptr<int32_t>());
  // One field after the other: two fields may share a word.
  for (int64_t field = 0; field < source.size(0); ++field) {
    const FieldPlace place(field, bits);
    const uint8_t* in = from + field * columns;
    uint32_t* low = to + place.word * columns;
    for (int64_t c = 0; c < columns; ++c) low[c] |= static_cast<uint32_t>(in[c]) << place.shift;
    if (!place.straddles) continue;
    uint32_t* high = low + columns;
    const int shift = static_cast<int>(kWordBits) - place.shift;
    for (int64_t c = 0; c < columns; ++c) high[c] |= static_cast<uint32_t>(in[c]) >> shift;
  }
  return result;
}

void check_tensor(const at::Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape, const std::string& name) {
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes());
}

at::Tensor checked_scales(const at::Tensor& scales, at::IntArrayRef shape, const std::string& name) {
  TORCH_CHECK(scales.is_floating_point(), name, " must be floating point, got ", scales.scalar_type());
  TORCH_CHECK(scales.sizes() == shape, name, " must have shape ", shape, ", got ", scales.sizes());
  TORCH_CHECK(scales.isfinite().all().item<bool>(), name, " must be finite, is not");
  const at::Tensor half = scales.to(at::kHalf);
  TORCH_CHECK(half.to(scales.scalar_type()).equal(scales), name, " must be f16, or hold values of f16 only, got ",
              scales.scalar_type(), " that f16 would round");
  return half;
}

// Zero points u8 [n_groups, N].
at::Tensor unpack_zeros(const at::Tensor& qzeros, const GptqLayout& layout) {
  const auto middle = static_cast<int64_t>(uint64_t{1} << (layout.bits - 1));
  const at::Tensor stored = unpack_fields(qzeros.t(), layout.bits).t();
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
    return unpack_fields(words.t(), layout.bits).t().contiguous();
  }
  return stored.add(1).bitwise_and_(static_cast<int64_t>(field_mask(layout.bits))).contiguous();
}

// The group of each column, in the order of the groups.
at::Tensor groups_in_order(int64_t k, int64_t group_size) {
  const at::Tensor columns = at::arange(k, at::kInt);
  return group_size == -1 ? at::zeros_like(columns) : columns.floor_divide(group_size);
}

// i32 [K], absent where the columns lie in the order of their groups.
std::optional<at::Tensor> order_of(const at::Tensor& g_idx, int64_t group_size, int64_t groups,
                                   const std::string& name) {
  const int64_t k = g_idx.size(0);
  if (k == 0) return std::nullopt;
  const auto outside = g_idx.lt(0).logical_or_(g_idx.ge(groups));
  if (outside.any().item<bool>()) {
    const auto column = outside.to(at::kByte).argmax().item<int64_t>();
    TORCH_CHECK(false, name, " must be in 0..", groups - 1, ", element ", column, " is ",
                g_idx[column].item<int64_t>());
  }
  const at::Tensor expected = groups_in_order(k, group_size);
  if (g_idx.equal(expected)) return std::nullopt;
  const at::Tensor order = at::argsort(g_idx, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  if (!g_idx.index_select(0, order).equal(expected)) {
    const at::Tensor widths = at::bincount(g_idx.to(at::kLong), {}, groups);
    const at::Tensor wanted = at::bincount(expected.to(at::kLong), {}, groups);
    const auto group = widths.ne(wanted).to(at::kByte).argmax().item<int64_t>();
    TORCH_CHECK(false, name, " must give group ", group, " ", wanted[group].item<int64_t>(),
                " columns, since group_size is ", group_size, ", got ", widths[group].item<int64_t>());
  }
  return order.to(at::kInt);
}

void check_below(const at::Tensor& values, int64_t bits, const std::string& name, const char* what) {
  if (values.numel() == 0) return;
  const auto largest = values.max().item<int64_t>();
  TORCH_CHECK(largest <= static_cast<int64_t>(field_mask(bits)), name, ": ", what, " must be in 0..", field_mask(bits),
              " with ", bits, " bits, got ", largest);
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
  result.zeros = unpack_zeros(tensors.qzeros, layout);
  if (tensors.g_idx) {
    check_tensor(*tensors.g_idx, at::kInt, {k}, name + ".g_idx");
    result.input_order = order_of(*tensors.g_idx, layout.group_size, groups, name + ".g_idx");
  }
  const at::Tensor codes = unpack_fields(qweight, bits);
  result.codes = (result.input_order ? codes.index_select(0, *result.input_order) : codes).t().contiguous();
  return result;
}

GptqTensors pack_gptq(const CodedWeight& weight, bool plain_zeros, const std::string& name) {
  const int64_t bits = weight.bits, n = weight.codes.size(0), k = weight.codes.size(1);
  check_gptq_fits(name, bits, weight.group_size, n, k);
  check_below(weight.codes, bits, name, "codes");
  check_below(weight.zeros, bits, name, "zeros");
  GptqTensors result;
  at::Tensor groups = groups_in_order(k, weight.group_size);
  at::Tensor codes = weight.codes.t();
  if (weight.input_order) {
    const at::Tensor order = weight.input_order->to(at::kLong);
    TORCH_CHECK(std::get<0>(order.sort()).equal(at::arange(k)), name, ": input_order must be a permutation of 0..",
                k - 1, ", is none");
    groups = at::empty_like(groups).index_copy_(0, order, groups);
    codes = at::empty({k, n}, at::kByte).index_copy_(0, order, codes);
  }
  result.qweight = pack_fields(codes, bits);
  result.g_idx = groups;
  result.scales = weight.scales;
  const at::Tensor stored =
      plain_zeros ? weight.zeros : weight.zeros.sub(1).bitwise_and_(static_cast<int64_t>(field_mask(bits)));
  result.qzeros = pack_fields(stored.t(), bits).t().contiguous();
  return result;
}

}  // namespace gptq
