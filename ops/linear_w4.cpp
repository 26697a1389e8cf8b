#include "gptq/linear_w4.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>

#include "linear_w4_check.h"

namespace gptq {
namespace {

// The checks of one operator; every message begins with its name.
struct Checks {
  const char* op;

  template <class... Parts>
  void require(bool holds, const Parts&... parts) const {
    TORCH_CHECK(holds, op, ": ", parts...);
  }

  void tensor(const at::Tensor& tensor, const char* name, at::ScalarType dtype, const at::Tensor& input) const {
    require(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
    require(tensor.device() == input.device(), name, " must be on input's device ", input.device(), ", got ",
            tensor.device());
  }

  void shape(const at::Tensor& tensor, const char* name, const char* letters, c10::SymIntArrayRef expected) const {
    require(tensor.sym_sizes() == expected, name, " must be ", letters, " = ", expected, ", got ", tensor.sym_sizes());
  }

  void floating(const at::Tensor& tensor, const char* name) const {
    const at::ScalarType dtype = tensor.scalar_type();
    require(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
            " must be Float, BFloat16 or Half, got ", dtype);
  }
};

}  // namespace

void check_linear_compute(const char* op, std::string_view compute) {
  TORCH_CHECK(compute == "exact" || compute == "bf16" || compute == "int8", op,
              ": compute must be \"exact\", \"bf16\" or \"int8\", got \"", compute, "\"");
}

void check_linear_w4(int bits, const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  const Checks check{bits == 8 ? "linear_w8" : "linear_w4"};
  check.floating(input, "input");
  check.require(input.dim() >= 1, "input must have at least one dimension, got a scalar");
  check.require(group_size == -1 || group_size >= 1, "group_size must be -1 or at least 1, got ", group_size);
  check_linear_compute(check.op, compute);
  check.tensor(packed, "packed", at::kByte, input);
  check.tensor(scales, "scales", at::kHalf, input);
  check.require(scales.dim() == 2, "scales must be [n_groups, N], got ", scales.sym_sizes());

  const c10::SymInt k = input.sym_size(-1), n = scales.sym_size(1);
  // No sum here can leave 64 bits, however large group_size is.
  constexpr int64_t kWidest = int64_t{1} << 62;
  const c10::SymInt groups =
      group_size == -1 ? c10::SymInt(k == 0 ? 0 : 1) : ceil_div(k, std::min(group_size, kWidest));
  check.shape(scales, "scales", "[n_groups, N]", {groups, n});
  check.shape(packed, "packed", bits == 8 ? "[ceil(N/16), ceil(K/8), 128]" : "[ceil(N/16), ceil(K/8), 64]",
              {ceil_div(n, kAtomRows), ceil_div(k, kAtomColumns), c10::SymInt(atom_bytes(bits))});
  if (zeros) {
    check.tensor(*zeros, "zeros", at::kByte, input);
    check.shape(*zeros, "zeros", "[n_groups, N]", {groups, n});
  }
  if (bias) {
    check.floating(*bias, "bias");
    check.tensor(*bias, "bias", bias->scalar_type(), input);
    check.shape(*bias, "bias", "[N]", {n});
  }
  if (input_order) {
    check.tensor(*input_order, "input_order", at::kInt, input);
    check.shape(*input_order, "input_order", "[K]", {k});
  }
}

int linear_w4_digits(at::ScalarType dtype, std::string_view compute) {
  if (compute == "int8") return 1;
  return compute == "exact" && dtype == at::kFloat ? 3 : 2;
}

LinearW4Arguments prepare_linear_w4(int bits, const at::Tensor& input, const at::Tensor& packed,
                                    const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                                    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& input_order,
                                    int64_t group_size, std::string_view compute) {
  check_linear_w4(bits, input, packed, scales, zeros, bias, input_order, group_size, compute);
  const at::ScalarType dtype = input.scalar_type();
  LinearW4Arguments a;
  LinearW4Operands& p = a.operands;
  p.bits = bits;
  p.n = scales.size(1);
  p.k = input.size(-1);
  p.m = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) p.m *= input.size(i);
  p.digits = linear_w4_digits(dtype, compute);
  p.type = dtype == at::kFloat ? LinearW4Type::kF32 : dtype == at::kHalf ? LinearW4Type::kF16 : LinearW4Type::kBf16;

  a.x = input.dim() == 2 ? input : input.reshape({p.m, p.k});
  if (a.x.stride(1) != 1) a.x = a.x.contiguous();
  a.packed = packed.contiguous();
  a.scales = scales.contiguous();
  if (zeros) a.zeros = zeros->contiguous();
  if (input_order) a.order = input_order->contiguous();
  if (bias) a.bias = bias->to(at::kFloat).contiguous();
  at::DimVector shape(input.sizes());
  shape.back() = p.n;
  a.y = at::empty(shape, input.options());
  p.x = a.x.const_data_ptr();
  p.x_stride = a.x.stride(0);
  p.order = input_order ? a.order.const_data_ptr<int32_t>() : nullptr;
  p.packed = a.packed.const_data_ptr<uint8_t>();
  p.scales = reinterpret_cast<const uint16_t*>(a.scales.const_data_ptr<at::Half>());
  p.zeros = zeros ? a.zeros.const_data_ptr<uint8_t>() : nullptr;
  p.bias = bias ? a.bias.const_data_ptr<float>() : nullptr;
  p.y = a.y.mutable_data_ptr();
  return a;
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
      const int64_t atoms = ceil_div(end, kAtomColumns) - first_atom;
      if (!groups.empty()) groups.back().ends_span = groups.back().begin / kSpan != begin / kSpan;
      groups.push_back({begin, end, weight_group, first_atom, atoms, digit_atom, true});
      digit_atom += atoms;
    }
  }
  return groups;
}

namespace {

template <int kBits>
at::Tensor linear_meta(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                       const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                       const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  check_linear_w4(kBits, input, packed, scales, zeros, bias, input_order, group_size, compute);
  c10::SymDimVector shape(input.sym_sizes());
  shape.back() = scales.sym_size(1);
  return at::empty_symint(shape, input.options());
}

}  // namespace

at::Tensor linear_w4(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gptq::linear_w4", "").typed<decltype(linear_w4)>();
  return op.call(input, packed, scales, zeros, bias, input_order, group_size, compute);
}

at::Tensor linear_w8(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                     const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gptq::linear_w8", "").typed<decltype(linear_w8)>();
  return op.call(input, packed, scales, zeros, bias, input_order, group_size, compute);
}

TORCH_LIBRARY_IMPL(gptq, Meta, m) {
  m.impl("linear_w4", linear_meta<4>);
  m.impl("linear_w8", linear_meta<8>);
}

// Inference only: with an input that requires grad the product is computed, and backward says that it cannot.
TORCH_LIBRARY_IMPL(gptq, Autograd, m) {
  for (const char* name : {"linear_w4", "linear_w8", "dequantize_w4", "dequantize_w8"})
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace gptq
