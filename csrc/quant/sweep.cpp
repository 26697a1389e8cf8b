#include "quant/sweep.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <functional>

#include "quant/strips.h"
#include "quant/sweep_kernel.h"

namespace gptq {
namespace {

template <typename T>
class Sweeper {
 public:
  Sweeper(const at::Tensor& weight, const Factor& factor, const Plan& plan, Grid& grid)
      : plan_(plan), n_(weight.size(0)), k_(weight.size(1)) {
    const auto dtype = weight.scalar_type();
    weights_ = to_strips<T>(weight.index_select(1, factor.order), 0);
    errors_ = at::empty_like(weights_);
    scales_ = to_strips<T>(grid.scales.t().to(dtype), 1);
    zeros_ = to_strips<T>(grid.zeros.t().to(dtype), 0);
    group_ = factor.order.div(grid.group_size, "floor");
    multipliers_ = factor.multipliers;
    pivots_ = factor.pivots.to(dtype);
    damping_ = factor.added.to(dtype);
    losses_ = at::zeros({weights_.size(0), 1, kRows}, weights_.options());
    const int64_t target_columns = plan.dynamic_groups ? std::max(plan.block_size, plan.group_size) : plan.block_size;
    targets_ = at::empty({weights_.size(0), target_columns, kRows}, weights_.options());
  }

  SweepResult run(const Factor& factor, Grid& grid) {
    at::parallel_for(0, weights_.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        sweep_strip(s);
      }
    });
    if (plan_.dynamic_groups) {
      grid.scales.copy_(from_strips(scales_, n_).t());
      grid.zeros.copy_(from_strips(zeros_, n_).t());
    }
    at::Tensor codes = at::empty({n_, k_}, at::kByte);
    codes.index_copy_(1, factor.order, from_strips(weights_, n_).to(at::kByte));
    return {codes, from_strips(losses_, n_).squeeze(1).to(at::kDouble)};
  }

 private:
  static constexpr int64_t kRows = kStripRows<T>;

  void sweep_strip(int64_t s) const {
    const SweepStrip<T> strip{k_,
                              multipliers_.const_data_ptr<T>(),
                              pivots_.const_data_ptr<T>(),
                              damping_.const_data_ptr<T>(),
                              group_.const_data_ptr<int64_t>(),
                              strip_data<T>(weights_, s),
                              strip_data<T>(errors_, s),
                              strip_data<T>(scales_, s),
                              strip_data<T>(zeros_, s),
                              static_cast<T>(plan_.rule.max_code()),
                              strip_data<T>(losses_, s)};
    T* targets = strip_data<T>(targets_, s);
    for (int64_t first = 0, last = 0; first < k_; first = last) {
      last = std::min(first + plan_.block_size, k_);
      if (plan_.dynamic_groups) {
        const int64_t group_start = first / plan_.group_size * plan_.group_size;
        last = std::min(last, group_start + plan_.group_size);
        if (first == group_start) {
          set_group_grid(strip, s, first, targets);
        }
      }
      load_targets(strip, first, last - first, targets);
      sweep_block(strip, first, last - first, targets);
    }
  }

  static void load_targets(const SweepStrip<T>& strip, int64_t first, int64_t count, T* targets) {
    std::copy_n(strip.weights + first * kRows, count * kRows, targets);
    pull_errors(strip, 0, first, first, count, targets);
  }

  // targets[c] += Σ_{j in [from, to)} errors[j] · M_j,first+c
  static void pull_errors(const SweepStrip<T>& strip, int64_t from, int64_t to, int64_t first, int64_t count,
                          T* targets) {
    pull(strip.multipliers + first * strip.n_columns, strip.n_columns, strip.errors, from, to, count, targets);
  }

  // What the published form has added to the weights of the columns from first on, before it sweeps them. They are not
  // the partial sums of the pull form, S = E_F M_Fg over swept columns F and columns g from first on, but X with
  // X M_gg = S. X goes to updates, and -X to the errors of g, which are free until g is swept.
  static void solve_updates(const SweepStrip<T>& strip, int64_t first, int64_t count, T* updates) {
    std::fill_n(updates, count * kRows, T(0));
    pull_errors(strip, 0, first, first, count, updates);
    for (int64_t c = 0; c < count; ++c) {
      T* update = updates + c * kRows;
      pull_errors(strip, first, first + c, first + c, 1, update);
      std::transform(update, update + kRows, strip.errors + (first + c) * kRows, std::negate<T>());
    }
  }

  // Scales of the group that starts at column first, from its weights with all updates so far.
  void set_group_grid(const SweepStrip<T>& strip, int64_t s, int64_t first, T* updates) const {
    const int64_t count = std::min(plan_.group_size, k_ - first);
    solve_updates(strip, first, count, updates);
    T* scales = strip_data<T>(scales_, s) + strip.group[first] * kRows;
    T* zeros = strip_data<T>(zeros_, s) + strip.group[first] * kRows;
    for (int64_t row = 0; row < std::min(kRows, n_ - s * kRows); ++row) {
      T lo = 0, hi = 0;
      for (int64_t c = 0; c < count; ++c) {
        const T weight = strip.weights[(first + c) * kRows + row] + updates[c * kRows + row];
        lo = std::min(lo, weight);
        hi = std::max(hi, weight);
      }
      const GridPoint point = minmax_grid_point(lo, hi, plan_.rule);
      scales[row] = static_cast<T>(point.scale);
      zeros[row] = static_cast<T>(point.zero);
    }
  }

  const Plan& plan_;
  int64_t n_, k_;
  at::Tensor weights_, errors_, scales_, zeros_, group_, multipliers_, pivots_, damping_, losses_, targets_;
};

}  // namespace

SweepResult sweep(const at::Tensor& weight, const Factor& factor, const Plan& plan, Grid& grid) {
  SweepResult result;
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "sweep",
                             [&] { result = Sweeper<scalar_t>(weight, factor, plan, grid).run(factor, grid); });
  return result;
}

}  // namespace gptq
