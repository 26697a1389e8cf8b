#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <c10/util/Exception.h>
#include <gptq/quantize_weight.h>

#include <cmath>

#include "quant/factor.h"
#include "quant/grid.h"
#include "quant/loss.h"
#include "quant/plan.h"
#include "quant/sweep.h"

namespace gptq {
namespace {

// Largest difference between H and Hᵀ, as a share of the largest entry, that passes for rounding.
constexpr double kSymmetryTolerance = 1e-4;

void check_finite(const at::Tensor& values, const char* name) {
  const int64_t bad = values.numel() - values.isfinite().sum().item<int64_t>();
  TORCH_CHECK(bad == 0, "quantize_weight: ", name, " must be finite in ", values.scalar_type(), ", got ", bad,
              " NaN or Inf values of ", values.numel());
}

at::Tensor checked_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.defined() && weight.dim() == 2 && weight.numel() > 0,
              "quantize_weight: weight must be [N, K] with at least one row and one column, got ",
              weight.defined() ? weight.sizes() : at::IntArrayRef{});
  TORCH_CHECK(weight.is_floating_point(), "quantize_weight: weight must be floating point, got ", weight.scalar_type());
  TORCH_CHECK(weight.is_cpu(), "quantize_weight: weight must be on the CPU, got ", weight.device());
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor values = weight.detach().to(dtype).contiguous();
  check_finite(values, "weight");
  return values;
}

// The Hessian in the weight's dtype.
at::Tensor checked_hessian(const at::Tensor& hessian, const at::Tensor& weight) {
  const int64_t k = weight.size(1);
  TORCH_CHECK(hessian.dim() == 2 && hessian.size(0) == k && hessian.size(1) == k,
              "quantize_weight: hessian must be [K, K] = [", k, ", ", k, "], got ", hessian.sizes());
  TORCH_CHECK(hessian.is_floating_point(), "quantize_weight: hessian must be floating point, got ",
              hessian.scalar_type());
  TORCH_CHECK(hessian.is_cpu(), "quantize_weight: hessian must be on the CPU, got ", hessian.device());
  const at::Tensor values = hessian.detach().to(weight.scalar_type()).contiguous();
  check_finite(values, "hessian");
  const double largest = values.abs().max().item<double>();
  const double difference = values.sub(values.t()).abs_().max().item<double>();
  TORCH_CHECK(difference <= kSymmetryTolerance * largest,
              "quantize_weight: hessian must be symmetric, got a difference of ", difference,
              " between H and its transpose; its largest entry is ", largest);
  const double least = values.diagonal().min().item<double>();
  TORCH_CHECK(least >= 0, "quantize_weight: hessian must be positive semidefinite, got ", least, " on its diagonal");
  return values;
}

// The weight that the float model's outputs ask for on drifted inputs.
at::Tensor moved_weight(const at::Tensor& weight, const at::Tensor& drift, const Factor& factor, double alpha) {
  const int64_t k = weight.size(1);
  TORCH_CHECK(drift.dim() == 2 && drift.size(0) == k && drift.size(1) == k, "quantize_weight: drift must be [K, K] = [",
              k, ", ", k, "], got ", drift.sizes());
  TORCH_CHECK(drift.is_floating_point(), "quantize_weight: drift must be floating point, got ", drift.scalar_type());
  TORCH_CHECK(drift.is_cpu(), "quantize_weight: drift must be on the CPU, got ", drift.device());
  const at::Tensor values = drift.detach().to(weight.scalar_type());
  check_finite(values, "drift");
  const at::Tensor moved = times_inverse(weight.mm(values), factor).mul_(alpha).add_(weight);
  check_finite(moved, "weight moved against the drift");
  return moved;
}

at::Tensor sweep_order(const at::Tensor& hessian, bool act_order) {
  return act_order ? at::argsort(hessian.diagonal(), /*stable=*/true, /*dim=*/0, /*descending=*/true)
                   : at::arange(hessian.size(0), at::kLong);
}

double grid_loss(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& codes, const Grid& grid) {
  const at::Tensor values = dequantize_codes(codes, grid.scales, grid.zeros, grid.group_size, weight.scalar_type());
  return quadratic_form(weight.sub(values), hessian);
}

void fill_losses(const at::Tensor& weight, const at::Tensor& hessian, double loss, double rtn_loss,
                 QuantizeReport& report) {
  const double size = quadratic_form(weight, hessian);
  report.loss = loss;
  report.rtn_loss = rtn_loss;
  report.relative_error = size > 0 ? std::sqrt(loss / size) : 0;
  report.rtn_relative_error = size > 0 ? std::sqrt(rtn_loss / size) : 0;
}

}  // namespace

QuantizeResult quantize_weight(const at::Tensor& weight, const at::Tensor& hessian, const QuantizeOptions& options,
                               const at::Tensor& drift) {
  const at::NoGradGuard no_grad;
  at::Tensor w = checked_weight(weight);
  const Plan plan = make_plan(options, w.size(1));
  TORCH_CHECK(hessian.defined() || !plan.sweep, "quantize_weight: hessian is required in mode \"", options.mode,
              "\", got none");
  const at::Tensor h = hessian.defined() ? checked_hessian(hessian, w) : at::Tensor();

  QuantizeResult result;
  Factor factor;
  if (plan.sweep) {
    factor = factorise(h, sweep_order(h, plan.act_order), plan.damping);
    if (drift.defined() && plan.target_alpha > 0) {
      w = moved_weight(w, drift, factor, plan.target_alpha);
    }
  }
  Grid grid = minmax_grid(w, plan);
  result.codes = round_to_grid(w, grid);
  const double rtn_loss = grid_loss(w, h, result.codes, grid);
  double loss = rtn_loss;
  if (plan.sweep) {
    result.codes = sweep(w, factor, plan, grid);
    loss = grid_loss(w, h, result.codes, grid);
  }
  result.report.damping = factor.damping;
  result.report.damping_escalations = factor.damping_escalations;
  result.report.float64 = factor.float64;
  result.report.dead_columns = h.defined() ? h.diagonal().eq(0).sum().item<int64_t>() : 0;
  fill_losses(w, h, loss, rtn_loss, result.report);
  result.scales = grid.scales;
  result.zeros = grid.zeros;
  result.group_size = options.per_tensor ? -1 : options.group_size;
  return result;
}

at::Tensor QuantizeResult::dequantize() const {
  return dequantize_codes(codes, scales, zeros, group_size, at::kFloat);
}

}  // namespace gptq
