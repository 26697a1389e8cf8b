#include "tools/lab_common.h"

#include <torch/script.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "quant/gram.h"
#include "quant/loss.h"

namespace gptq::tools {
namespace {

constexpr int64_t kScaleBits = 16;
constexpr int64_t kDrawnRows = 1024;  // inputs held at a time

}  // namespace

CLI::Validator group_size_check() {
  return CLI::Validator(
      [](std::string& text) {
        int64_t value = 0;
        const char* end = text.data() + text.size();
        const auto [rest, error] = std::from_chars(text.data(), end, value);
        const bool valid = error == std::errc() && rest == end && (value == -1 || value >= 1);
        return valid ? std::string() : "must be -1 or at least 1, got " + text;
      },
      "INT", "group size");
}

void QuantizerFlags::add_to(CLI::App& sub, Study& study) {
  study.setting(sub, "mode", mode, "default or classic (the published algorithm)")
      ->check(CLI::IsMember({"default", "classic"}));
  study.setting(sub, "act-order", act_order, "Order of columns: auto, static (by the Hessian) or off")
      ->check(CLI::IsMember({"auto", "static", "off"}));
  study.setting(sub, "grid", grid, "symmetric, or asymmetric: a zero point per group")
      ->check(CLI::IsMember({"symmetric", "asymmetric"}));
  study.setting(sub, "damping", damping, "Share of the Hessian diagonal's mean that is added to it")
      ->check(CLI::NonNegativeNumber);
}

QuantizeOptions QuantizerFlags::options(int64_t bits, int64_t group_size) const {
  QuantizeOptions options;
  options.bits = bits;
  options.group_size = group_size;
  options.symmetric = grid == "symmetric";
  options.act_order = act_order;
  options.mode = mode;
  options.damping = damping;
  return options;
}

void WeightFlags::add_to(CLI::App& sub, Study& study) {
  study.setting(sub, "rows", rows, "Outputs of the layer")->check(CLI::PositiveNumber);
  study.setting(sub, "columns", columns, "Inputs of the layer")->check(CLI::PositiveNumber);
  study.setting(sub, "std", std, "Standard deviation of the weights")->check(CLI::PositiveNumber);
}

at::Tensor WeightFlags::draw(at::Generator generator) const {
  return at::randn({rows, columns}, std::move(generator), at::kFloat).mul_(std);
}

Inputs Inputs::independent(int64_t columns) {
  Inputs inputs;
  inputs.scale_ = at::ones({columns});
  return inputs;
}

Inputs Inputs::correlated(int64_t columns, int64_t factors, double shared, at::Generator generator) {
  Inputs inputs = independent(columns);
  const at::Tensor variance = at::arange(1, factors + 1, at::kFloat).reciprocal_();
  const at::Tensor loadings = at::randn({factors, columns}, std::move(generator), at::kFloat);
  inputs.factors_ = loadings.mul_(variance.sqrt().unsqueeze(1));
  // Every channel has unit variance.
  inputs.factors_.mul_(inputs.factors_.square().sum(0).rsqrt_().mul_(std::sqrt(shared)));
  inputs.noise_ = std::sqrt(1 - shared);
  return inputs;
}

void Inputs::scale_channels(const at::Tensor& by) {
  scale_ = scale_.mul(by);
}

at::Tensor Inputs::draw(int64_t samples, at::Generator generator) const {
  at::Tensor x = at::randn({samples, scale_.size(0)}, generator, at::kFloat).mul_(noise_);
  if (factors_.defined()) {
    x.addmm_(at::randn({samples, factors_.size(0)}, generator, at::kFloat), factors_);
  }
  return x.mul_(scale_);
}

at::Tensor Inputs::covariance() const {
  at::Tensor result = at::eye(scale_.size(0)).mul_(noise_ * noise_);
  if (factors_.defined()) {
    result.addmm_(factors_.t(), factors_);
  }
  return result.mul_(scale_).mul_(scale_.unsqueeze(1));
}

at::Tensor Inputs::hessian(int64_t samples, at::Generator generator) const {
  at::Tensor gram = at::zeros({scale_.size(0), scale_.size(0)});
  for (int64_t done = 0; done < samples; done += kDrawnRows) {
    add_gram(gram, draw(std::min(kDrawnRows, samples - done), generator).t().contiguous());
  }
  return mirrored(gram, 1.0 / static_cast<double>(samples));
}

void InputFlags::add_to(CLI::App& sub, Study& study) {
  study.setting(sub, "factors", factors, "Correlated inputs: number of shared factors; 0: an eighth of the columns")
      ->check(CLI::NonNegativeNumber);
  study.setting(sub, "shared", shared, "Correlated inputs: share of a channel's variance that is the factors'")
      ->check(CLI::Range(0.0, 1.0));
}

Inputs InputFlags::correlated(int64_t columns, at::Generator generator) const {
  return Inputs::correlated(columns, factors > 0 ? factors : std::max<int64_t>(1, columns / 8), shared,
                            std::move(generator));
}

Json Distance::json() const {
  return {{"mse", mse}, {"loss", loss}, {"heldout_loss", heldout_loss}, {"relative_error", relative_error}};
}

Yardstick::Yardstick(at::Tensor weight, at::Tensor heldout)
    : weight_(std::move(weight)), heldout_(std::move(heldout)), norm_(quadratic_form(weight_, heldout_)) {}

Distance Yardstick::quantized(const at::Tensor& hessian, const QuantizeOptions& options) const {
  const QuantizeResult result = quantize_weight(weight_, hessian, options);
  const at::Tensor error = weight_.sub(result.dequantize());
  Distance distance;
  distance.mse = quadratic_form(error, {}) / static_cast<double>(error.numel());
  distance.loss = result.report.loss;
  distance.heldout_loss = quadratic_form(error, heldout_);
  distance.relative_error = std::sqrt(distance.heldout_loss / norm_);
  return distance;
}

double effective_bits(int64_t rows, int64_t columns, const QuantizeOptions& options) {
  const bool one_per_row = options.group_size == -1 || options.group_size >= columns;
  const int64_t per_row = one_per_row ? 1 : (columns + options.group_size - 1) / options.group_size;
  const int64_t groups = options.per_tensor ? 1 : rows * per_row;
  const int64_t group_bits = kScaleBits + (options.symmetric ? 0 : options.bits);
  return static_cast<double>(options.bits) +
         static_cast<double>(groups * group_bits) / static_cast<double>(rows * columns);
}

}  // namespace gptq::tools
