#include "model/packed_words.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace gptq {

namespace {

constexpr int64_t kRowsPerTask = 16;

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

void check_below(const at::Tensor& values, int64_t bits, const std::string& name, const char* what) {
  if (values.numel() == 0) return;
  const auto largest = values.max().item<int64_t>();
  TORCH_CHECK(largest <= static_cast<int64_t>(field_mask(bits)), name, ": ", what, " must be in 0..", field_mask(bits),
              " with ", bits, " bits, got ", largest);
}

}  // namespace

uint32_t field_mask(int64_t bits) {
  return (uint32_t{1} << bits) - 1;
}

int64_t word_count(int64_t fields, int64_t bits) {
  return (fields * bits + kWordBits - 1) / kWordBits;
}

at::Tensor unpack_fields(const at::Tensor& words, int64_t fields, int64_t bits) {
  const at::Tensor source = words.contiguous();
  const int64_t columns = source.size(1);
  at::Tensor result = at::empty({fields, columns}, at::kByte);
  const auto* from = reinterpret_cast<const uint32_t*>(source.const_data_ptr<int32_t>());
  auto* to = result.data_ptr<uint8_t>();
  const uint32_t mask = field_mask(bits);
  at::parallel_for(0, fields, kRowsPerTask, [&](int64_t begin, int64_t end) {
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

at::Tensor pack_fields(const at::Tensor& values, int64_t bits) {
  const at::Tensor source = values.contiguous();
  const int64_t columns = source.size(1);
  at::Tensor result = at::zeros({word_count(source.size(0), bits), columns}, at::kInt);
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

at::Tensor groups_in_order(int64_t k, int64_t group_size) {
  const at::Tensor columns = at::arange(k, at::kInt);
  return group_size == -1 ? at::zeros_like(columns) : columns.floor_divide(group_size);
}

std::optional<at::Tensor> order_of_groups(const at::Tensor& g_idx, int64_t group_size, int64_t groups,
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

PlacedCodes place_codes(const CodedWeight& weight, const std::string& name) {
  check_below(weight.codes, weight.bits, name, "codes");
  check_below(weight.zeros, weight.bits, name, "zeros");
  const int64_t k = weight.codes.size(1);
  PlacedCodes result{weight.codes.t(), groups_in_order(k, weight.group_size)};
  if (!weight.input_order) return result;
  const at::Tensor order = weight.input_order->to(at::kLong);
  TORCH_CHECK(std::get<0>(order.sort()).equal(at::arange(k)), name, ": input_order must be a permutation of 0..", k - 1,
              ", is none");
  result.groups = at::empty_like(result.groups).index_copy_(0, order, result.groups);
  result.codes = at::empty({k, weight.codes.size(0)}, at::kByte).index_copy_(0, order, result.codes);
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

}  // namespace gptq
