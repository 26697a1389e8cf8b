#include "gptq/linear_w4.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>

#include "linear_w4_check.h"

namespace gptq {
namespace {

c10::SymInt ceil_div(const c10::SymInt& a, int64_t b) {
  return (a + (b - 1)) / b;
}

void check_tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype, const at::Tensor& input) {
  TORCH_CHECK(tensor.scalar_type() == dtype, "linear_w4: ", name, " must be ", dtype, ", got ", tensor.scalar_type());
  TORCH_CHECK(tensor.device() == input.device(), "linear_w4: ", name, " must be on input's device ", input.device(),
              ", got ", tensor.device());
}

void check_shape(const at::Tensor& tensor, const char* name, const char* letters, c10::SymIntArrayRef shape) {
  TORCH_CHECK(tensor.sym_sizes() == shape, "linear_w4: ", name, " must be ", letters, " = ", shape, ", got ",
              tensor.sym_sizes());
}

void check_float(const at::Tensor& tensor, const char* name) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "linear_w4: ", name,
              " must be Float, BFloat16 or Half, got ", dtype);
}

}  // namespace

void check_linear_w4(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  check_float(input, "input");
  TORCH_CHECK(input.dim() >= 1, "linear_w4: input must have at least one dimension, got a scalar");
  TORCH_CHECK(group_size == -1 || group_size >= 1, "linear_w4: group_size must be -1 or at least 1, got ", group_size);
  linear_w4_digits(input.scalar_type(), compute);
  check_tensor(packed, "packed", at::kByte, input);
  check_tensor(scales, "scales", at::kHalf, input);
  TORCH_CHECK(scales.dim() == 2, "linear_w4: scales must be [n_groups, N], got ", scales.sym_sizes());

  const c10::SymInt k = input.sym_size(-1), n = scales.sym_size(1);
  // No sum here can leave 64 bits, however large group_size is.
  constexpr int64_t kWidest = int64_t{1} << 62;
  const c10::SymInt groups =
      group_size == -1 ? c10::SymInt(k == 0 ? 0 : 1) : ceil_div(k, std::min(group_size, kWidest));
  check_shape(scales, "scales", "[n_groups, N]", {groups, n});
  check_shape(packed, "packed", "[ceil(N/16), ceil(K/8), 64]",
              {ceil_div(n, kAtomRows), ceil_div(k, kAtomColumns), c10::SymInt(kAtomBytes)});
  if (zeros) {
    check_tensor(*zeros, "zeros", at::kByte, input);
    check_shape(*zeros, "zeros", "[n_groups, N]", {groups, n});
  }
  if (bias) {
    check_float(*bias, "bias");
    check_tensor(*bias, "bias", bias->scalar_type(), input);
    check_shape(*bias, "bias", "[N]", {n});
  }
  if (input_order) {
    check_tensor(*input_order, "input_order", at::kInt, input);
    check_shape(*input_order, "input_order", "[K]", {k});
  }
}

int linear_w4_digits(at::ScalarType dtype, std::string_view compute) {
  if (compute == "int8") return 1;
  if (compute == "bf16") return 2;
  TORCH_CHECK(compute == "exact", "linear_w4: compute must be \"exact\", \"bf16\" or \"int8\", got \"", compute, "\"");
  return dtype == at::kFloat ? 3 : 2;
}

std::vector<LinearW4Group> linear_w4_groups(int64_t k, int64_t group_size) {
  std::vector<LinearW4Group> groups;
  const int64_t width = group_size == -1 ? k : group_size;
  int64_t digit_atom = 0;
  for (int64_t weight_group = 0, begin = 0; begin < k; ++weight_group) {
    // Written so that a group_size beyond k cannot overflow.
    const int64_t group_end = width < k - begin ? begin + width : k;
    for (; begin < group_end; begin = groups.back().end) {
      const int64_t end = std::min(begin + kActivationGroup, group_end);
      const int64_t first_atom = begin / kAtomColumns;
      const int64_t atoms = (end + kAtomColumns - 1) / kAtomColumns - first_atom;
      if (!groups.empty()) groups.back().ends_span = groups.back().begin / kSpan != begin / kSpan;
      groups.push_back({begin, end, weight_group, first_atom, atoms, digit_atom, true});
      digit_atom += atoms;
    }
  }
  return groups;
}

namespace {

at::Tensor linear_w4_meta(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                          const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  check_linear_w4(input, packed, scales, zeros, bias, input_order, group_size, compute);
  c10::SymDimVector shape(input.sym_sizes());
  shape.back() = scales.sym_size(1);
  return at::empty_symint(shape, input.options());
}

}  // namespace

at::Tensor linear_w4(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gptq::linear_w4", "").typed<decltype(linear_w4_meta)>();
  return op.call(input, packed, scales, zeros, bias, input_order, group_size, compute);
}

TORCH_LIBRARY_IMPL(gptq, Meta, m) {
  m.impl("linear_w4", linear_w4_meta);
}

// Inference only: with an input that requires grad the product is computed, and backward says that it cannot.
TORCH_LIBRARY_IMPL(gptq, Autograd, m) {
  m.impl("linear_w4", torch::autograd::autogradNotImplementedFallback());
  m.impl("dequantize_w4", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace gptq
