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
  const auto is_float = [](const at::Tensor& tensor) {
    return tensor.is_cpu() && tensor.scalar_type() == at::kFloat &&
           !(at::GradMode::is_enabled() && tensor.requires_grad());
  };
  const bool fits = is_float(input) && is_float(weight) && input.dim() >= 2 && weight.dim() == 2 &&
                    input.size(-1) == weight.size(1) && fits_onednn(input, weight) &&
                    (!bias || (is_float(*bias) && bias->sizes() == weight.sizes().slice(0, 1)));
  return fits ? onednn_product(input, weight, bias) : at::linear(input, weight, bias);
}

at::Tensor coarse(const at::Tensor& matrix) {
  const bool faster = matrix.is_cuda() || (cpu_features() & kCpuAvx512bf16) != 0;
  return matrix.scalar_type() == at::kFloat && faster ? matrix.to(at::kBFloat16) : matrix;
}

at::Tensor coarse_product(const at::Tensor& a, const at::Tensor& b) {
  return fits_onednn(a, b) ? product(coarse(a), coarse(b)).to(a.scalar_type()) : product(a, b);
}

}  // namespace gptq
