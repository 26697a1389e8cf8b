#include <ATen/core/grad_mode.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gptq/gptq_layer.h>

#include <limits>
#include <utility>

#include "quant/gram.h"

namespace gptq {

GPTQLayer::GPTQLayer(at::Tensor weight, std::optional<at::Tensor> bias, bool conv1d)
    : weight_(std::move(weight)), bias_(std::move(bias)), conv1d_(conv1d) {
  TORCH_CHECK(weight_.defined() && weight_.dim() == 2 && weight_.numel() > 0, "GPTQLayer: weight must be ",
              conv1d ? "[K, N]" : "[N, K]", " with N and K at least 1, got ",
              weight_.defined() ? weight_.sizes() : at::IntArrayRef{});
  TORCH_CHECK(weight_.is_floating_point(), "GPTQLayer: weight must be floating point, got ", weight_.scalar_type());
  TORCH_CHECK(weight_.is_cpu(), "GPTQLayer: weight must be on the CPU, got ", weight_.device());
  if (bias_.has_value()) {
    const int64_t n = weight_nk().size(0);
    TORCH_CHECK(bias_->dim() == 1 && bias_->size(0) == n, "GPTQLayer: bias must be [N] = [", n, "], got ",
                bias_->sizes());
    TORCH_CHECK(bias_->is_floating_point(), "GPTQLayer: bias must be floating point, got ", bias_->scalar_type());
  }
}

at::Tensor GPTQLayer::weight_nk() const {
  const at::Tensor weight = weight_.detach();
  return conv1d_ ? weight.t() : weight;
}

void GPTQLayer::add_batch(const at::Tensor& input) {
  const at::NoGradGuard no_grad;
  const int64_t k = weight_nk().size(1);
  TORCH_CHECK(input.dim() >= 1 && input.size(-1) == k, "add_batch: input must be [..., K] = [..., ", k, "], got ",
              input.sizes());
  TORCH_CHECK(input.is_floating_point(), "add_batch: input must be floating point, got ", input.scalar_type());
  TORCH_CHECK(input.is_cpu(), "add_batch: input must be on the CPU, got ", input.device());
  const at::Tensor rows = input.detach().to(at::kFloat).reshape({-1, k});
  if (rows.size(0) == 0) {
    return;
  }
  // Off the diagonal a Gram matrix is nowhere larger than on it.
  at::Tensor squares = at::linalg_vector_norm(rows, 2, at::IntArrayRef{0}, false, at::kDouble).square_();
  if (!squares.isfinite().all().item<bool>()) {
    const int64_t bad = rows.numel() - rows.isfinite().sum().item<int64_t>();
    TORCH_CHECK(false, "add_batch: input must be finite in float32, got ", bad, " NaN or Inf values of ", rows.numel());
  }
  if (gram_.defined()) {
    squares.add_(gram_.diagonal());
  }
  const double largest = squares.max().item<double>();
  TORCH_CHECK(largest < std::numeric_limits<float>::max() / 2,
              "add_batch: input is too large: a sum of its squares is ", largest, ", beyond float32");
  if (!gram_.defined()) {
    gram_ = at::zeros({k, k}, at::kFloat);
  }
  add_gram(gram_, rows);
  nsamples_ += rows.size(0);
}

at::Tensor GPTQLayer::hessian() const {
  const at::NoGradGuard no_grad;
  const int64_t k = weight_nk().size(1);
  return gram_.defined() ? mirrored(gram_, 2.0 / static_cast<double>(nsamples_)) : at::zeros({k, k}, at::kFloat);
}

at::Tensor GPTQLayer::gram() const {
  const at::NoGradGuard no_grad;
  const int64_t k = weight_nk().size(1);
  return gram_.defined() ? mirrored(gram_, 1.0) : at::zeros({k, k}, at::kFloat);
}

void GPTQLayer::set_gram(const at::Tensor& gram, int64_t nsamples) {
  const at::NoGradGuard no_grad;
  const int64_t k = weight_nk().size(1);
  TORCH_CHECK(gram.dim() == 2 && gram.size(0) == k && gram.size(1) == k, "set_gram: gram must be [K, K] = [", k, ", ",
              k, "], got ", gram.sizes());
  TORCH_CHECK(nsamples >= 0, "set_gram: nsamples must be at least 0, got ", nsamples);
  gram_ = nsamples > 0 ? gram.detach().to(at::kFloat).clone() : at::Tensor();
  nsamples_ = nsamples;
}

QuantizeResult GPTQLayer::quantize(const QuantizeOptions& options) const {
  TORCH_CHECK(nsamples_ > 0 || options.mode == "rtn", "GPTQLayer: quantize in mode \"", options.mode,
              "\" needs at least one input from add_batch, got none");
  return quantize_weight(weight_nk(), nsamples_ > 0 ? hessian() : at::Tensor(), options);
}

void GPTQLayer::write_back(const QuantizeResult& result) {
  const at::NoGradGuard no_grad;
  at::Tensor target = conv1d_ ? weight_.t() : weight_;
  TORCH_CHECK(result.codes.defined() && result.codes.sizes() == target.sizes(),
              "write_back: codes must be [N, K] = ", target.sizes(), ", got ",
              result.codes.defined() ? result.codes.sizes() : at::IntArrayRef{});
  const at::Tensor values = result.dequantize().to(target.scalar_type());
  TORCH_CHECK(values.isfinite().all().item<bool>(), "write_back: the dequantized weight must be finite in the ",
              target.scalar_type(), " of the layer's weight, got values beyond it");
  target.copy_(values);
}

}  // namespace gptq
