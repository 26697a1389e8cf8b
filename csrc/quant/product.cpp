#include "quant/product.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>

#include "cpu/cpu_features.h"
#include "quant/gram.h"

namespace gptq {
namespace {

constexpr int64_t kSmall = 32;  // a side below which a call of oneDNN costs more than it gives

const std::optional<c10::OperatorHandle>& onednn_linear() {
  static const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return handle;
}

// Whether oneDNN is there, and its call pays, for rows of x times wᵀ.
bool fits_onednn(const at::Tensor& x, const at::Tensor& w) {
  const int64_t k = x.size(-1);
  return x.is_cpu() && at::globalContext().userEnabledMkldnn() && onednn_linear() && x.numel() >= kSmall * k &&
         w.size(0) >= kSmall && k >= kSmall;
}

// Whether torch multiplies a type slowly on this processor, far more so than float32.
bool is_slow(at::ScalarType dtype) {
  return dtype == at::kHalf || (dtype == at::kBFloat16 && (cpu_features() & kCpuAvx512bf16) == 0);
}

at::Tensor dense(const at::Tensor& w) {
  const bool turned = w.scalar_type() == at::kFloat && !w.is_contiguous() && w.t().is_contiguous();
  return turned ? transposed(w.t()) : w.contiguous();
}

at::Tensor onednn_product(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& bias = {}) {
  torch::jit::Stack stack{x.contiguous(),
                          dense(w),
                          bias ? c10::IValue(bias->contiguous()) : c10::IValue(),
                          "none",
                          c10::impl::GenericList(c10::OptionalType::create(c10::NumberType::get())),
                          c10::IValue()};
  onednn_linear()->callBoxed(stack);
  return stack.at(0).toTensor();
}

}  // namespace

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() != at::kDouble && fits_onednn(a, b) ? onednn_product(a, b) : a.mm(b.t());
}

at::Tensor linear_dense(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto dtype = input.scalar_type();
  const auto is_plain = [&](const at::Tensor& tensor) {
    return tensor.is_cpu() && tensor.scalar_type() == dtype && !(at::GradMode::is_enabled() && tensor.requires_grad());
  };
  const bool fits = is_plain(input) && is_plain(weight) && input.dim() >= 2 && weight.dim() == 2 &&
                    input.size(-1) == weight.size(1) && fits_onednn(input, weight) &&
                    (!bias || (is_plain(*bias) && bias->sizes() == weight.sizes().slice(0, 1)));
  if (fits && dtype == at::kFloat) {
    return onednn_product(input, weight, bias);
  }
  if (fits && is_slow(dtype)) {
    const auto added = bias ? std::optional(bias->to(at::kFloat)) : std::nullopt;
    return onednn_product(input.to(at::kFloat), weight.to(at::kFloat), added).to(dtype);
  }
  return at::linear(input, weight, bias);
}

at::Tensor coarse(const at::Tensor& matrix) {
  const bool faster = matrix.is_cuda() || (cpu_features() & kCpuAvx512bf16) != 0;
  return matrix.scalar_type() == at::kFloat && faster ? matrix.to(at::kBFloat16) : matrix;
}

at::Tensor coarse_product(const at::Tensor& a, const at::Tensor& b) {
  return fits_onednn(a, b) ? product(coarse(a), coarse(b)).to(a.scalar_type()) : product(a, b);
}

}  // namespace gptq
