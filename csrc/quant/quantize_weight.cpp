#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/minimum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <gptq/quantize_weight.h>

#include <array>
#include <cmath>
#include <limits>

#include "quant/factor.h"
#include "quant/grid.h"
#include "quant/loss.h"
#include "quant/plan.h"
#include "quant/product.h"
#include "quant/read_scalars.h"
#include "quant/refine.h"
#include "quant/scale_search.h"
#include "quant/statistics.h"
#include "quant/sweep.h"

namespace gptq {
namespace {

// What the damping is multiplied by in turn when it is searched.
constexpr std::array kDampingFactors{1.0, 3.0, 10.0};

// Codes, their grid, and the loss of each row, f64 [N].
struct Solution {
  Grid grid;
  at::Tensor codes;
  at::Tensor losses;

  at::Tensor values(at::ScalarType dtype) const {
    return dequantize_codes(codes, grid.scales, grid.zeros, grid.group_size, dtype);
  }
  at::Tensor error(const at::Tensor& weight) const { return weight.sub(values(weight.scalar_type())); }
};

at::Tensor sweep_order(const at::Tensor& hessian, bool by_diagonal) {
  return by_diagonal ? at::argsort(hessian.diagonal(), /*stable=*/true, /*dim=*/0, /*descending=*/true)
                     : at::arange(hessian.size(0), hessian.options().dtype(at::kLong));
}

// In the order of storage what the factor holds in sweep order.
at::Tensor as_stored(const at::Tensor& swept, const Factor& factor) {
  return at::empty_like(swept).index_copy_(0, factor.order, swept);
}

// The weight that the float model's outputs ask for on drifted inputs.
at::Tensor moved_weight(const at::Tensor& weight, const at::Tensor& drift, const Factor& factor, double alpha) {
  const at::Tensor moved = times_inverse(product(weight, drift.t()), factor).mul_(alpha).add_(weight);
  check_finite(moved, "weight moved against the drift");
  return moved;
}

Solution round_to_nearest(const at::Tensor& weight, const at::Tensor& hessian, const Plan& plan) {
  Solution solution{minmax_grid(weight, plan), {}, {}};
  solution.codes = round_to_grid(weight, solution.grid);
  const at::Tensor error = solution.error(weight);
  // Beside a sweep they are there for comparison.
  solution.losses = plan.sweep ? coarse_row_forms(error, hessian) : row_forms(error, hessian);
  return solution;
}

// The same with searched scales: what an error in a column costs is its diagonal of H, or 1 if there is no H.
Solution round_to_searched_grid(const at::Tensor& weight, const at::Tensor& hessian, const Plan& plan) {
  Solution solution{minmax_grid(weight, plan), {}, {}};
  search_grid(weight, hessian.defined() ? hessian.diagonal() : at::ones({weight.size(1)}, weight.options()),
              solution.grid);
  solution.codes = round_to_grid(weight, solution.grid);
  solution.losses = row_forms(solution.error(weight), hessian);
  return solution;
}

Solution swept(const at::Tensor& weight, const Factor& factor, const Plan& plan) {
  Solution solution{minmax_grid(weight, plan), {}, {}};
  if (plan.weighted_scales && !plan.dynamic_groups) {
    search_grid(weight, as_stored(factor.pivots, factor), solution.grid);
  }
  SweepResult result = sweep(weight, factor, plan, solution.grid);
  solution.codes = std::move(result.codes);
  solution.losses = result.losses.clamp_min_(0);
  return solution;
}

void refine(const at::Tensor& weight, const at::Tensor& hessian, const Factor& factor, const Plan& plan,
            Solution& solution) {
  refine_codes(weight, hessian, as_stored(factor.added, factor), plan.refine_sweeps, /*fit_scales=*/!plan.per_tensor,
               solution.grid, solution.codes, solution.losses);
  solution.losses.clamp_min_(0);
}

// Takes the rows of nearest where they are better; returns how many. The losses of nearest are coarse: rows that come
// close are computed again.
int64_t guard_rows(const at::Tensor& weight, const at::Tensor& hessian, const Solution& nearest, Solution& solution) {
  constexpr double doubt = 0.95;
  const at::Tensor close = solution.losses.gt(nearest.losses.mul(doubt)).nonzero().squeeze(1);
  if (close.numel() == 0) {
    return 0;
  }
  const auto exact = [&](const Solution& of) { return row_forms(of.error(weight).index_select(0, close), hessian); };
  const at::Tensor found = exact(solution), rounded = exact(nearest), worse = found.gt(rounded);
  const at::Tensor rows = close.index_select(0, worse.nonzero().squeeze(1));
  solution.losses.index_copy_(0, close, at::minimum(found, rounded));
  if (rows.numel() > 0) {
    solution.codes.index_copy_(0, rows, nearest.codes.index_select(0, rows));
    for (const auto member : {&Grid::scales, &Grid::zeros}) {
      (solution.grid.*member).index_copy_(1, rows, (nearest.grid.*member).index_select(1, rows));
    }
  }
  return rows.numel();
}

// One half of the inputs to fit and the other to judge by, on some of the rows.
struct HeldOut {
  at::Tensor weight;
  LayerStatistics fitted;
  LayerStatistics judge;

  HeldOut(const at::Tensor& whole, const LayerStatistics& statistics) {
    constexpr int64_t rows = 512;
    weight = whole.slice(0, 0, c10::nullopt, std::max<int64_t>(1, whole.size(0) / rows)).contiguous();
    judge.hessian = statistics.half_hessian;
    judge.drift = statistics.half_drift;
    fitted.hessian = statistics.hessian.mul(2).sub_(judge.hessian);
    fitted.hessian.diagonal().clamp_min_(0);
    fitted.drift = judge.drift.defined() ? statistics.drift.mul(2).sub_(judge.drift) : at::Tensor();
  }

  // With drift that of the outputs: 2/n Σ |W x - Q x̂|² less what does not depend on Q.
  double loss(const Solution& solution) const {
    const at::Tensor error = solution.error(weight);
    const double own = quadratic_form(error, judge.hessian);
    return judge.drift.defined()
               ? own + 2 * product(weight, judge.drift.t()).mul_(error).sum(at::kDouble).item<double>()
               : own;
  }
};

// Sets the plan's damping to what does best on the held-out half, and drops refinement if it does worse there.
void search_on_held_out(const at::Tensor& weight, const LayerStatistics& statistics, Plan& plan) {
  const HeldOut half(weight, statistics);
  double best = plan.damping, best_loss = INFINITY, refined_loss = INFINITY;
  for (const double multiple : kDampingFactors) {
    const double damping = multiple * plan.damping;
    const Factor factor = factorise(half.fitted.hessian, sweep_order(half.fitted.hessian, plan.by_diagonal), damping);
    const at::Tensor target = half.fitted.drift.defined()
                                  ? moved_weight(half.weight, half.fitted.drift, factor, plan.target_alpha)
                                  : half.weight;
    Solution solution = swept(target, factor, plan);
    const double loss = half.loss(solution);
    if (loss < best_loss) {
      best_loss = loss;
      best = damping;
      if (plan.refine_sweeps > 0) {
        refine(target, half.fitted.hessian, factor, plan, solution);
        refined_loss = half.loss(solution);
      }
    }
  }
  plan.damping = best;
  if (!(refined_loss < best_loss)) {
    plan.refine_sweeps = 0;
  }
}

void fill_report(const at::Tensor& weight, const LayerStatistics& statistics, const Factor& factor, const Plan& plan,
                 const Solution& nearest, const Solution& solution, const at::Tensor& sweep_loss,
                 QuantizeReport& report) {
  const at::Tensor none = at::zeros({}, solution.losses.options());
  const at::Tensor& hessian = statistics.hessian;
  const auto [loss, swept_loss, rtn_loss, size, dead] = read_scalars(
      solution.losses.sum(), sweep_loss.defined() ? sweep_loss : none, plan.compare ? nearest.losses.sum() : none,
      plan.compare ? coarse_row_forms(weight, hessian).sum() : none,
      hessian.defined() ? hessian.diagonal().eq(0).sum() : none);
  report.loss = loss;
  report.sweep_loss = swept_loss;
  report.rtn_loss = report.relative_error = report.rtn_relative_error = std::numeric_limits<double>::quiet_NaN();
  if (plan.compare) {
    report.rtn_loss = rtn_loss;
    report.relative_error = size > 0 ? std::sqrt(loss / size) : 0;
    report.rtn_relative_error = size > 0 ? std::sqrt(rtn_loss / size) : 0;
  }
  report.damping = factor.damping;
  report.damping_escalations = factor.damping_escalations;
  report.float64 = factor.float64;
  report.dead_columns = static_cast<int64_t>(dead);
}

// Everything after the checks.
QuantizeResult solve(const at::Tensor& weight, const LayerStatistics& given, Plan plan) {
  QuantizeResult result;
  const bool correct_bias = plan.sweep && given.mean.defined();
  const LayerStatistics statistics = correct_bias ? centred(given) : given;
  at::Tensor target = weight;
  Factor factor;
  if (plan.sweep) {
    if (plan.search_damping) {
      search_on_held_out(weight, given, plan);
    }
    factor = factorise(statistics.hessian, sweep_order(statistics.hessian, plan.by_diagonal), plan.damping);
    if (statistics.drift.defined()) {
      target = moved_weight(weight, statistics.drift, factor, plan.target_alpha);
    }
  }
  const bool read_nearest = plan.compare || plan.row_guard || !plan.sweep;
  const Solution nearest = read_nearest ? round_to_nearest(target, statistics.hessian, plan) : Solution{};
  Solution solution = nearest;
  at::Tensor sweep_loss;
  if (plan.sweep) {
    solution = swept(target, factor, plan);
    sweep_loss = solution.losses.sum();
    if (plan.refine_sweeps > 0) {
      refine(target, statistics.hessian, factor, plan, solution);
      result.report.refined = true;
    }
    if (plan.row_guard) {
      result.report.guarded_rows = guard_rows(target, statistics.hessian, nearest, solution);
    }
  } else if (plan.weighted_scales) {
    solution = round_to_searched_grid(target, statistics.hessian, plan);
  }
  fill_report(target, statistics, factor, plan, nearest, solution, sweep_loss, result.report);
  if (correct_bias) {
    const at::Tensor float_mean = given.float_mean.defined() ? given.float_mean : given.mean;
    result.bias_shift = weight.mv(float_mean).sub_(solution.values(weight.scalar_type()).mv(given.mean)).to(at::kFloat);
  }
  result.codes = solution.codes;
  result.scales = solution.grid.scales;
  result.zeros = solution.grid.zeros;
  return result;
}

}  // namespace

QuantizeResult quantize_weight(const at::Tensor& weight, const LayerStatistics& statistics,
                               const QuantizeOptions& options) {
  const at::NoGradGuard no_grad;
  at::Tensor w = checked_weight(weight);
  const c10::DeviceGuard guard(w.device());  // of the kernels' stream
  QuantizeOptions used = options;
  Plan plan = make_plan(options, w.size(1));
  const bool too_few = plan.sweep && statistics.nsamples >= 0 && statistics.nsamples < options.min_samples;
  if (too_few) {
    used.mode = "rtn";
    plan = make_plan(used, w.size(1));
  }
  TORCH_CHECK(statistics.hessian.defined() || !plan.sweep, "quantize_weight: hessian is required in mode \"", used.mode,
              "\", got none");
  LayerStatistics read = checked_statistics(moved_to(w.device(), statistics, weight.device()), w, plan);
  at::Tensor order;
  if (plan.permute) {
    order = sweep_order(read.hessian, true);
    w = w.index_select(1, order);
    read = permuted(read, order);
  }
  QuantizeResult result = solve(w, read, plan);
  result.report.too_few_samples = too_few;
  result.group_size = options.per_tensor ? -1 : options.group_size;
  if (order.defined()) {
    result.input_order = order.to(at::kInt);
  }
  for (at::Tensor* tensor : {&result.codes, &result.scales, &result.zeros, &result.bias_shift, &result.input_order}) {
    *tensor = tensor->defined() ? tensor->to(weight.device()) : *tensor;
  }
  return result;
}

QuantizeResult quantize_weight(const at::Tensor& weight, const at::Tensor& hessian, const QuantizeOptions& options) {
  LayerStatistics statistics;
  statistics.hessian = hessian;
  return quantize_weight(weight, statistics, options);
}

at::Tensor QuantizeResult::dequantize() const {
  const at::Tensor values = dequantize_codes(codes, scales, zeros, group_size, at::kFloat);
  return input_order.defined() ? at::empty_like(values).index_copy_(1, input_order.to(at::kLong), values) : values;
}

}  // namespace gptq
