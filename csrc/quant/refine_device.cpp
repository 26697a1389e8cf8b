#include "quant/refine_device.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "quant/grid_device.h"

namespace gptq {
namespace {

constexpr int64_t kBlock = 128;  // columns of a group that one kernel moves

// Columns of the weight are rows here.
template <typename T>
class DeviceRefinement {
 public:
  DeviceRefinement(const DeviceKernels<T>& kernels, const at::Tensor& weight, const at::Tensor& hessian,
                   const at::Tensor& added, const Grid& grid, const at::Tensor& codes)
      : kernels_(kernels),
        grid_(grid),
        hessian_(hessian),
        damping_(added.to(weight.scalar_type())),
        scales_(grid.scales.to(weight.scalar_type())),
        zeros_(grid.zeros.to(weight.scalar_type())),
        levels_(
            codes.t().to(weight.scalar_type(), /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous)),
        changes_(at::empty({grid.group_size, n_}, weight.options())),
        losses_(at::zeros({n_}, weight.options())) {
    levels_.sub_(of_entries(zeros_, grid.group_size, k_));
    errors_ = weight.t().sub(levels_.mul(of_entries(scales_, grid.group_size, k_))).contiguous();
  }

  void run(int64_t sweeps, bool fit_scales) const {
    for (int64_t step = 0; step < sweeps; ++step) {
      for (int64_t first = 0; first < k_; first += grid_.group_size) {
        refine_group(first, std::min(grid_.group_size, k_ - first), fit_scales);
      }
    }
  }

  void store(Grid& grid, at::Tensor& codes, at::Tensor& losses) {
    grid.scales.copy_(scales_);
    codes.copy_(levels_.add_(of_entries(zeros_, grid_.group_size, k_)).t());
    losses.add_(losses_);
  }

 private:
  T* from(const at::Tensor& columns, int64_t first) const { return columns.data_ptr<T>() + first * n_; }

  T* group_row(const at::Tensor& table, int64_t first) const { return from(table, first / grid_.group_size); }

  void refine_group(int64_t first, int64_t count, bool fit_scales) const {
    const at::Tensor rows = hessian_.narrow(0, first, count), within = rows.narrow(1, first, count);
    at::Tensor gradients = rows.mm(errors_);
    gradients.addcmul_(errors_.narrow(0, first, count), damping_.narrow(0, first, count).unsqueeze(1));
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      move_block(first, begin, std::min(kBlock, count - begin), within, gradients);
    }
    if (fit_scales) {
      const at::Tensor changes = changes_.narrow(0, 0, count), levels = levels_.narrow(0, first, count);
      const at::Tensor moved = gradients.addmm_(within, changes), products = within.mm(levels);
      kernels_.fit_scales({n_, count, damping_.const_data_ptr<T>() + first, from(levels_, first), from(changes_, 0),
                           from(moved, 0), from(products, 0), from(errors_, first), group_row(scales_, first),
                           losses_.data_ptr<T>()});
    }
  }

  // Moves columns [begin, begin + count) of the group that starts at column first.
  void move_block(int64_t first, int64_t begin, int64_t count, const at::Tensor& within,
                  const at::Tensor& gradients) const {
    const at::Tensor own = gradients.narrow(0, begin, count);
    const at::Tensor current =
        begin == 0 ? own
                   : at::addmm(own, within.narrow(0, begin, count).narrow(1, 0, begin), changes_.narrow(0, 0, begin));
    const int64_t column = first + begin;
    kernels_.move_codes({n_, count, hessian_.const_data_ptr<T>() + column * (k_ + 1), k_, from(current, 0),
                         damping_.const_data_ptr<T>() + column, from(levels_, column), from(errors_, column),
                         from(changes_, begin), group_row(scales_, first), group_row(zeros_, first),
                         static_cast<T>(grid_.rule.max_code()), losses_.data_ptr<T>()});
  }

  const DeviceKernels<T>& kernels_;
  const Grid& grid_;
  at::Tensor hessian_, damping_, scales_, zeros_, levels_;
  int64_t n_ = levels_.size(1), k_ = levels_.size(0);
  at::Tensor changes_, losses_, errors_;
};

}  // namespace

template <typename T>
void refine_on_device(const DeviceKernels<T>& kernels, const at::Tensor& weight, const at::Tensor& hessian,
                      const at::Tensor& added, int64_t sweeps, bool fit_scales, Grid& grid, at::Tensor& codes,
                      at::Tensor& losses) {
  DeviceRefinement<T> refinement(kernels, weight, hessian, added, grid, codes);
  refinement.run(sweeps, fit_scales);
  refinement.store(grid, codes, losses);
}

template void refine_on_device(const DeviceKernels<float>&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               int64_t, bool, Grid&, at::Tensor&, at::Tensor&);
template void refine_on_device(const DeviceKernels<double>&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                               int64_t, bool, Grid&, at::Tensor&, at::Tensor&);

}  // namespace gptq
