#include "quant/refine.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "quant/gradient_factor.h"
#include "quant/refine_device.h"
#include "quant/refine_kernel.h"
#include "quant/strips.h"

namespace gptq {
namespace {

// What a thread needs for one strip.
struct Buffers {
  at::Tensor errors, levels, gradients, changes, losses;
  GradientStrip factored;
};

template <typename T>
class Refiner {
 public:
  Refiner(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& added, const Grid& grid)
      : grid_(grid), weight_(weight), hessian_(hessian), factor_(hessian), damping_(added.to(weight.scalar_type())) {
    scales_ = groups_to_strips<T>(grid.scales, 1);
    zeros_ = groups_to_strips<T>(grid.zeros, 0);
  }

  void run(int64_t sweeps, bool fit_scales, at::Tensor& codes, at::Tensor& losses) const {
    at::parallel_for(0, strip_count<T>(n_), 1, [&](int64_t begin, int64_t end) {
      const auto columns = [&](int64_t count) { return at::empty({count, kRows}, weight_.options()); };
      std::vector<Buffers> buffers;
      for (int64_t i = 0; i < std::min(kStripsTogether, end - begin); ++i) {
        buffers.push_back({columns(k_ + k_ % 2), columns(k_), columns(grid_.group_size), columns(grid_.group_size),
                           columns(1), factor_.make_strip(grid_.group_size)});
      }
      for (int64_t first = begin; first < end; first += kStripsTogether) {
        const int64_t last = std::min(first + kStripsTogether, end);
        for (int64_t s = first; s < last; ++s) {
          load(s, codes, buffers[s - first]);
        }
        for (int64_t step = 0; step < sweeps; ++step) {
          refine_strips(first, last, fit_scales, buffers);
        }
        for (int64_t s = first; s < last; ++s) {
          store(s, buffers[s - first], codes, losses);
        }
      }
    });
  }

  const at::Tensor& scales() const { return scales_; }

 private:
  static constexpr int64_t kRows = kStripRows<T>;

  int64_t rows_of(int64_t s) const { return std::min(kRows, n_ - s * kRows); }

  // Calls body(column, its scales, its zero points) for every column of a strip.
  template <typename Body>
  void for_each_column(int64_t s, const Body& body) const {
    for (int64_t k = 0; k < k_; ++k) {
      const int64_t group = k / grid_.group_size;
      body(k, strip_data<T>(scales_, s) + group * kRows, strip_data<T>(zeros_, s) + group * kRows);
    }
  }

  void load(int64_t s, const at::Tensor& codes, const Buffers& buffers) const {
    T* errors = buffers.errors.data_ptr<T>();
    T* levels = buffers.levels.data_ptr<T>();
    load_strip(weight_.const_data_ptr<T>() + s * kRows * k_, rows_of(s), k_, k_, errors,
               [](T weight) { return weight; });
    load_strip(codes.const_data_ptr<uint8_t>() + s * kRows * k_, rows_of(s), k_, k_, levels,
               [](uint8_t code) { return static_cast<T>(code); });
    buffers.losses.zero_();
    for_each_column(s, [&](int64_t k, const T* scales, const T* zeros) {
      for (int64_t row = 0; row < kRows; ++row) {
        levels[k * kRows + row] -= zeros[row];
        errors[k * kRows + row] -= levels[k * kRows + row] * scales[row];
      }
    });
    std::fill_n(errors + k_ * kRows, k_ % 2 * kRows, T(0));
    factor_.load(errors, buffers.factored);
  }

  void load_gradients(int64_t first, int64_t count, size_t strips, const std::vector<Buffers>& buffers) const {
    for (size_t i = 0; i < strips; ++i) {
      std::fill_n(buffers[i].gradients.data_ptr<T>(), count * kRows, T(0));
    }
    for (int64_t part = 0; part < factor_.parts(); ++part) {
      for (size_t i = 0; i < strips; ++i) {
        factor_.add_part(part, buffers[i].errors.const_data_ptr<T>(), buffers[i].factored, first, count,
                         buffers[i].gradients.data_ptr<T>());
      }
    }
  }

  void refine_strips(int64_t begin, int64_t end, bool fit_scales, const std::vector<Buffers>& buffers) const {
    for (int64_t first = 0, group = 0; first < k_; first += grid_.group_size, ++group) {
      const int64_t count = std::min(grid_.group_size, k_ - first);
      load_gradients(first, count, static_cast<size_t>(end - begin), buffers);
      for (int64_t s = begin; s < end; ++s) {
        const Buffers& own = buffers[s - begin];
        factor_.before_change(own.errors.const_data_ptr<T>(), first, count, own.factored);
        refine_group({k_, hessian_.const_data_ptr<T>(), damping_.const_data_ptr<T>(), first, count,
                      static_cast<T>(grid_.rule.max_code()), own.errors.data_ptr<T>(), own.levels.data_ptr<T>(),
                      strip_data<T>(scales_, s) + group * kRows, strip_data<T>(zeros_, s) + group * kRows,
                      own.gradients.data_ptr<T>(), own.changes.data_ptr<T>(), own.losses.data_ptr<T>(), fit_scales});
        factor_.after_change(own.errors.const_data_ptr<T>(), first, count, own.factored);
      }
    }
  }

  void store(int64_t s, const Buffers& buffers, const at::Tensor& codes, const at::Tensor& losses) const {
    T* levels = buffers.levels.data_ptr<T>();
    for_each_column(s, [&](int64_t k, const T*, const T* zeros) {
      std::transform(levels + k * kRows, levels + (k + 1) * kRows, zeros, levels + k * kRows, std::plus<T>());
    });
    store_lanes<kRows>(levels, rows_of(s), k_, codes.data_ptr<uint8_t>() + s * kRows * k_, k_,
                       [](T level) { return static_cast<uint8_t>(level); });
    double* sums = losses.data_ptr<double>() + s * kRows;
    std::transform(sums, sums + rows_of(s), buffers.losses.const_data_ptr<T>(), sums, std::plus<double>());
  }

  const Grid& grid_;
  at::Tensor weight_, hessian_;
  GradientFactor<T> factor_;
  at::Tensor damping_, scales_, zeros_;
  int64_t n_ = weight_.size(0), k_ = weight_.size(1);
};

}  // namespace

void refine_codes(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& added, int64_t sweeps,
                  bool fit_scales, Grid& grid, at::Tensor& codes, at::Tensor& losses) {
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "refine_codes", [&] {
    if (const auto* kernels = device_kernels<scalar_t>(weight.device().type())) {
      return refine_on_device<scalar_t>(*kernels, weight, hessian, added, sweeps, fit_scales, grid, codes, losses);
    }
    const Refiner<scalar_t> refiner(weight, hessian, added, grid);
    refiner.run(sweeps, fit_scales, codes, losses);
    groups_from_strips(refiner.scales(), grid.scales);
  });
}

}  // namespace gptq
