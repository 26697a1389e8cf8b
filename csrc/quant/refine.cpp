#include "quant/refine.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "quant/refine_kernel.h"
#include "quant/strips.h"

namespace gptq {
namespace {

// What a thread needs for one strip at a time.
struct Buffers {
  at::Tensor errors, levels, gradients, changes, losses;
};

template <typename T>
class Refiner {
 public:
  Refiner(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& added, const Grid& grid)
      : grid_(grid), weight_(weight), hessian_(hessian), damping_(added.to(weight.scalar_type())) {
    scales_ = groups_to_strips<T>(grid.scales, 1);
    zeros_ = groups_to_strips<T>(grid.zeros, 0);
  }

  void run(int64_t sweeps, bool fit_scales, at::Tensor& codes, at::Tensor& losses) const {
    at::parallel_for(0, strip_count<T>(n_), 1, [&](int64_t begin, int64_t end) {
      const auto columns = [&](int64_t count) { return at::empty({count, kRows}, weight_.options()); };
      const Buffers buffers{columns(k_), columns(k_), columns(grid_.group_size), columns(grid_.group_size), columns(1)};
      for (int64_t s = begin; s < end; ++s) {
        refine_strip(s, sweeps, fit_scales, buffers, codes.data_ptr<uint8_t>() + s * kRows * k_,
                     losses.data_ptr<double>() + s * kRows);
      }
    });
  }

  const at::Tensor& scales() const { return scales_; }

 private:
  static constexpr int64_t kRows = kStripRows<T>;

  void refine_strip(int64_t s, int64_t sweeps, bool fit_scales, const Buffers& buffers, uint8_t* codes,
                    double* losses) const {
    const int64_t rows = std::min(kRows, n_ - s * kRows);
    T* errors = buffers.errors.data_ptr<T>();
    T* levels = buffers.levels.data_ptr<T>();
    load_strip(weight_.const_data_ptr<T>() + s * kRows * k_, rows, k_, k_, errors, [](T weight) { return weight; });
    load_strip(codes, rows, k_, k_, levels, [](uint8_t code) { return static_cast<T>(code); });
    buffers.losses.zero_();
    for (int64_t k = 0; k < k_; ++k) {
      const int64_t group = k / grid_.group_size;
      const T* scales = strip_data<T>(scales_, s) + group * kRows;
      const T* zeros = strip_data<T>(zeros_, s) + group * kRows;
      for (int64_t row = 0; row < kRows; ++row) {
        levels[k * kRows + row] -= zeros[row];
        errors[k * kRows + row] -= levels[k * kRows + row] * scales[row];
      }
    }
    for (int64_t step = 0; step < sweeps; ++step) {
      for (int64_t first = 0, group = 0; first < k_; first += grid_.group_size, ++group) {
        refine_group({k_, hessian_.const_data_ptr<T>(), damping_.const_data_ptr<T>(), first,
                      std::min(grid_.group_size, k_ - first), static_cast<T>(grid_.rule.max_code()), errors, levels,
                      strip_data<T>(scales_, s) + group * kRows, strip_data<T>(zeros_, s) + group * kRows,
                      buffers.gradients.data_ptr<T>(), buffers.changes.data_ptr<T>(), buffers.losses.data_ptr<T>(),
                      fit_scales});
      }
    }
    for (int64_t first = 0, group = 0; first < k_; first += grid_.group_size, ++group) {
      const T* zeros = strip_data<T>(zeros_, s) + group * kRows;
      for (int64_t k = first; k < std::min(first + grid_.group_size, k_); ++k) {
        std::transform(levels + k * kRows, levels + (k + 1) * kRows, zeros, levels + k * kRows, std::plus<T>());
      }
    }
    store_lanes<kRows>(levels, rows, k_, codes, k_, [](T level) { return static_cast<uint8_t>(level); });
    std::transform(losses, losses + rows, buffers.losses.const_data_ptr<T>(), losses, std::plus<double>());
  }

  const Grid& grid_;
  at::Tensor weight_, hessian_, damping_, scales_, zeros_;
  int64_t n_ = weight_.size(0), k_ = weight_.size(1);
};

}  // namespace

void refine_codes(const at::Tensor& weight, const at::Tensor& hessian, const at::Tensor& added, int64_t sweeps,
                  bool fit_scales, Grid& grid, at::Tensor& codes, at::Tensor& losses) {
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "refine_codes", [&] {
    const Refiner<scalar_t> refiner(weight, hessian, added, grid);
    refiner.run(sweeps, fit_scales, codes, losses);
    groups_from_strips(refiner.scales(), grid.scales);
  });
}

}  // namespace gptq
