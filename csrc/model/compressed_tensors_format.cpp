#include "model/compressed_tensors_format.h"

#include <ATen/ATen.h>

#include "model/packed_words.h"

namespace gptq {

namespace {

int64_t middle_code(int64_t bits) {
  return int64_t{1} << (bits - 1);
}

void check_width(const std::string& name, int64_t bits) {
  TORCH_CHECK(bits >= 2 && bits <= 8, name, ": bits must be 2 to 8 in the compressed-tensors format, got ", bits);
}

void check_shape_tensor(const at::Tensor& shape, int64_t n, int64_t k, const std::string& name) {
  TORCH_CHECK(shape.scalar_type() == at::kLong || shape.scalar_type() == at::kInt, name, " must be Long or Int, got ",
              shape.scalar_type());
  TORCH_CHECK(shape.sizes() == at::IntArrayRef({2}), name, " must have shape [2], got ", shape.sizes());
  const auto rows = shape[0].item<int64_t>(), columns = shape[1].item<int64_t>();
  TORCH_CHECK(rows == n && columns == k, name, " must be [N, K] = [", n, ", ", k, "], got [", rows, ", ", columns, "]");
}

}  // namespace

void check_compressed_tensors_fits(const std::string& name, int64_t bits, int64_t group_size, int64_t k) {
  check_width(name, bits);
  TORCH_CHECK(group_size == -1 || (group_size > 0 && k % group_size == 0), name,
              ": group_size must be -1 or divide the ", k, " inputs in the compressed-tensors format, got ",
              group_size);
}

CodedWeight unpack_compressed_tensors(const CompressedTensors& tensors, const CompressedTensorsLayout& layout,
                                      int64_t n, int64_t k, const std::string& name) {
  const int64_t bits = layout.bits;
  check_compressed_tensors_fits(name, bits, layout.group_size, k);
  const int64_t groups = group_count(k, layout.group_size);
  check_shape_tensor(tensors.shape, n, k, name + ".weight_shape");
  check_tensor(tensors.packed, at::kInt, {n, word_count(k, bits)}, name + ".weight_packed");
  CodedWeight result;
  result.bits = bits;
  result.group_size = layout.group_size;
  result.scales = checked_scales(tensors.scale, {n, groups}, name + ".weight_scale").t().contiguous();
  if (layout.symmetric) {
    TORCH_CHECK(!tensors.zero_point, name, ".weight_zero_point must not be there in a symmetric group, is");
    result.zeros = at::full({groups, n}, middle_code(bits), at::kByte);
  } else {
    TORCH_CHECK(tensors.zero_point, name, ".weight_zero_point must be there in an asymmetric group, is not");
    check_tensor(*tensors.zero_point, at::kInt, {word_count(n, bits), groups}, name + ".weight_zero_point");
    result.zeros = unpack_fields(*tensors.zero_point, n, bits).t().contiguous();
  }
  if (tensors.g_idx) {
    check_tensor(*tensors.g_idx, at::kInt, {k}, name + ".weight_g_idx");
    result.input_order = order_of_groups(*tensors.g_idx, layout.group_size, groups, name + ".weight_g_idx");
  }
  const at::Tensor codes = unpack_fields(tensors.packed.t(), k, bits);
  result.codes = (result.input_order ? codes.index_select(0, *result.input_order) : codes).t().contiguous();
  return result;
}

CompressedTensors pack_compressed_tensors(const CodedWeight& weight, bool symmetric, const std::string& name) {
  const int64_t bits = weight.bits, n = weight.codes.size(0), k = weight.codes.size(1);
  check_compressed_tensors_fits(name, bits, weight.group_size, k);
  const PlacedCodes placed = place_codes(weight, name);
  TORCH_CHECK(
      placed.groups.equal(groups_in_order(k, weight.group_size)), name,
      ": columns of a group must lie together in the compressed-tensors format, which has dropped weight_g_idx, "
      "do not: act-order must be off or static");
  CompressedTensors result;
  result.packed = pack_fields(placed.codes, bits).t().contiguous();
  result.scale = weight.scales.t().contiguous();
  if (symmetric) {
    TORCH_CHECK(weight.zeros.eq(middle_code(bits)).all().item<bool>(), name, ": zeros must be ", middle_code(bits),
                " to be left out, are not");
  } else {
    result.zero_point = pack_fields(weight.zeros.t(), bits);
  }
  result.shape = at::tensor({n, k}, at::kLong);
  return result;
}

}  // namespace gptq
