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

// What a thread needs for one strip at a time.
struct Buffers {
  at::Tensor weights, errors, codes, targets, losses;
};

template <typename T>
class Sweeper {
 public:
  Sweeper(const at::Tensor& weight, const Factor& factor, const Plan& plan, const Grid& grid)
      : plan_(plan), weight_(weight), order_(factor.order), multipliers_(factor.multipliers) {
    scales_ = groups_to_strips<T>(grid.scales, 1);
    zeros_ = groups_to_strips<T>(grid.zeros, 0);
    pivots_ = factor.pivots.to(weight.scalar_type());
    damping_ = factor.added.to(weight.scalar_type());
  }

  SweepResult run(Grid& grid) {
    const SweepResult result{at::empty({n_, k_}, at::kByte), at::empty({n_}, at::kDouble)};
    at::parallel_for(0, strip_count<T>(n_), 1, [&](int64_t begin, int64_t end) {
      const auto columns = [&](int64_t count, at::ScalarType dtype) { return at::empty({count, kRows}, dtype); };
      const auto dtype = weight_.scalar_type();
      const int64_t targets = std::max(plan_.block_size, plan_.dynamic_groups ? plan_.group_size : 0);
      const Buffers buffers{columns(k_, dtype), columns(k_, dtype), columns(k_, at::kByte), columns(targets, dtype),
                            columns(1, dtype)};
      for (int64_t s = begin; s < end; ++s) {
        sweep_strip(s, buffers, result);
      }
    });
    if (plan_.dynamic_groups) {
      groups_from_strips(scales_, grid.scales);
      groups_from_strips(zeros_, grid.zeros);
    }
    return result;
  }

 private:
  static constexpr int64_t kRows = kStripRows<T>;

  void sweep_strip(int64_t s, const Buffers& buffers, const SweepResult& result) const {
    const int64_t rows = std::min(kRows, n_ - s * kRows);
    load_strip(weight_.const_data_ptr<T>() + s * kRows * k_, rows, k_, k_, buffers.weights.data_ptr<T>(),
               [](T weight) { return weight; });
    buffers.losses.zero_();
    const SweepStrip<T> strip{k_,
                              multipliers_.const_data_ptr<T>(),
                              pivots_.const_data_ptr<T>(),
                              damping_.const_data_ptr<T>(),
                              order_.const_data_ptr<int64_t>(),
                              plan_.group_size,
                              buffers.weights.data_ptr<T>(),
                              buffers.codes.data_ptr<uint8_t>(),
                              buffers.errors.data_ptr<T>(),
                              strip_data<T>(scales_, s),
                              strip_data<T>(zeros_, s),
                              static_cast<T>(plan_.rule.max_code()),
                              buffers.losses.data_ptr<T>()};
    sweep_blocks(strip, s, buffers.targets.data_ptr<T>());
    store_lanes<kRows>(strip.codes, rows, k_, result.codes.data_ptr<uint8_t>() + s * kRows * k_, k_,
                       [](uint8_t code) { return code; });
    std::copy_n(strip.losses, rows, result.losses.data_ptr<double>() + s * kRows);
  }

  void sweep_blocks(const SweepStrip<T>& strip, int64_t s, T* targets) const {
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
    for (int64_t c = 0; c < count; ++c) {
      std::copy_n(strip.weights + strip.order[first + c] * kRows, kRows, targets + c * kRows);
    }
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
    const int64_t group = first / plan_.group_size;
    T* scales = strip_data<T>(scales_, s) + group * kRows;
    T* zeros = strip_data<T>(zeros_, s) + group * kRows;
    for (int64_t row = 0; row < std::min(kRows, n_ - s * kRows); ++row) {
      T lo = 0, hi = 0;
      for (int64_t c = 0; c < count; ++c) {
        const T weight = strip.weights[strip.order[first + c] * kRows + row] + updates[c * kRows + row];
        lo = std::min(lo, weight);
        hi = std::max(hi, weight);
      }
      const GridPoint point = minmax_grid_point(lo, hi, plan_.rule);
      scales[row] = static_cast<T>(point.scale);
      zeros[row] = static_cast<T>(point.zero);
    }
  }

  const Plan& plan_;
  at::Tensor weight_, order_, multipliers_, scales_, zeros_, pivots_, damping_;
  int64_t n_ = weight_.size(0), k_ = weight_.size(1);
};

}  // namespace

SweepResult sweep(const at::Tensor& weight, const Factor& factor, const Plan& plan, Grid& grid) {
  SweepResult result;
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "sweep",
                             [&] { result = Sweeper<scalar_t>(weight, factor, plan, grid).run(grid); });
  return result;
}

}  // namespace gptq
