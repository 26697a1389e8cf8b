#include "quant/sweep.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "quant/strips.h"
#include "quant/sweep_device.h"
#include "quant/sweep_kernel.h"

namespace gptq {
namespace {

// What a thread needs for one strip.
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
      std::vector<Buffers> buffers;
      for (int64_t i = 0; i < std::min(kStripsTogether, end - begin); ++i) {
        buffers.push_back(make_buffers());
      }
      for (int64_t s = begin; s < end; s += kStripsTogether) {
        sweep_strips(s, std::min(s + kStripsTogether, end), buffers, result);
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

  Buffers make_buffers() const {
    const auto columns = [&](int64_t count, at::ScalarType dtype) { return at::empty({count, kRows}, dtype); };
    const auto dtype = weight_.scalar_type();
    const int64_t targets = std::max(plan_.block_size, plan_.dynamic_groups ? plan_.group_size : 0);
    return {columns(k_, dtype), columns(k_, dtype), columns(k_, at::kByte), columns(targets, dtype), columns(1, dtype)};
  }

  int64_t rows_of(int64_t s) const { return std::min(kRows, n_ - s * kRows); }

  SweepStrip<T> load(int64_t s, const Buffers& buffers) const {
    load_strip(weight_.const_data_ptr<T>() + s * kRows * k_, rows_of(s), k_, k_, buffers.weights.data_ptr<T>(),
               [](T weight) { return weight; });
    buffers.losses.zero_();
    return {k_,
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
  }

  void store(const SweepStrip<T>& strip, int64_t s, const SweepResult& result) const {
    store_lanes<kRows>(strip.codes, rows_of(s), k_, result.codes.data_ptr<uint8_t>() + s * kRows * k_, k_,
                       [](uint8_t code) { return code; });
    std::copy_n(strip.losses, rows_of(s), result.losses.data_ptr<double>() + s * kRows);
  }

  void sweep_strips(int64_t begin, int64_t end, const std::vector<Buffers>& buffers, const SweepResult& result) const {
    std::vector<SweepStrip<T>> strips;
    std::vector<T*> targets;
    for (int64_t s = begin; s < end; ++s) {
      const Buffers& own = buffers[static_cast<size_t>(s - begin)];
      strips.push_back(load(s, own));
      targets.push_back(own.targets.data_ptr<T>());
    }
    for (int64_t first = 0, last = 0; first < k_; first = last) {
      last = std::min(first + plan_.block_size, k_);
      if (plan_.dynamic_groups) {
        const int64_t group_start = first / plan_.group_size * plan_.group_size;
        last = std::min(last, group_start + plan_.group_size);
        for (size_t i = 0; first == group_start && i < strips.size(); ++i) {
          set_group_grid(strips[i], begin + static_cast<int64_t>(i), first, targets[i]);
        }
      }
      load_targets(strips, first, last - first, targets);
      for (size_t i = 0; i < strips.size(); ++i) {
        sweep_block(strips[i], first, last - first, targets[i]);
      }
    }
    for (int64_t s = begin; s < end; ++s) {
      store(strips[static_cast<size_t>(s - begin)], s, result);
    }
  }

  static void load_targets(const std::vector<SweepStrip<T>>& strips, int64_t first, int64_t count,
                           const std::vector<T*>& targets) {
    for (size_t i = 0; i < strips.size(); ++i) {
      for (int64_t c = 0; c < count; ++c) {
        std::copy_n(strips[i].weights + strips[i].order[first + c] * kRows, kRows, targets[i] + c * kRows);
      }
    }
    for (int64_t from = 0; from < first; from += kPulledColumns) {
      for (size_t i = 0; i < strips.size(); ++i) {
        pull_errors(strips[i], from, std::min(from + kPulledColumns, first), first, count, targets[i]);
      }
    }
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
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "sweep", [&] {
    const auto* kernels = device_kernels<scalar_t>(weight.device().type());
    result = kernels != nullptr ? sweep_on_device<scalar_t>(*kernels, weight, factor, plan, grid)
                                : Sweeper<scalar_t>(weight, factor, plan, grid).run(grid);
  });
  return result;
}

}  // namespace gptq
