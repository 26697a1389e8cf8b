#include "quant/product.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

#include "cpu/cpu_features.h"

namespace gptq {
namespace {

constexpr int64_t kSmall = 32;  // a side below which a call of oneDNN costs more than it gives

const std::optional<c10::OperatorHandle>& onednn_linear() {
  static const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return handle;
}

bool fits_onednn(const at::Tensor& a, const at::Tensor& b) {
  return a.is_cpu() && at::globalContext().userEnabledMkldnn() && onednn_linear() && a.size(0) >= kSmall &&
         b.size(0) >= kSmall && a.size(1) >= kSmall;
}

at::Tensor onednn_product(const at::Tensor& a, const at::Tensor& b) {
  torch::jit::Stack stack{a.contiguous(),
                          b.contiguous(),
                          c10::IValue(),
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

at::Tensor coarse(const at::Tensor& matrix) {
  const bool faster = matrix.is_cuda() || (cpu_features() & kCpuAvx512bf16) != 0;
  return matrix.scalar_type() == at::kFloat && faster ? matrix.to(at::kBFloat16) : matrix;
}

at::Tensor coarse_product(const at::Tensor& a, const at::Tensor& b) {
  return fits_onednn(a, b) ? product(coarse(a), coarse(b)).to(a.scalar_type()) : product(a, b);
}

}  // namespace gptq
