#include "quant/sweep_device.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "quant/grid_device.h"

namespace gptq {
namespace {

// Columns of the weight are rows here, in sweep order: a block of them is one piece of memory, and what it pulls one
// product.
template <typename T>
class DeviceSweep {
 public:
  DeviceSweep(const DeviceKernels<T>& kernels, const at::Tensor& weight, const Factor& factor, const Plan& plan,
              const Grid& grid)
      : kernels_(kernels),
        plan_(plan),
        multipliers_(factor.multipliers),
        order_(factor.order),
        weights_(weight.index_select(1, order_).t().contiguous()),
        pivots_(factor.pivots.to(weight.scalar_type())),
        damping_(factor.added.to(weight.scalar_type())),
        scales_(grid.scales.to(weight.scalar_type())),
        zeros_(grid.zeros.to(weight.scalar_type())),
        errors_(at::empty_like(weights_)),
        codes_(at::empty({k_, n_}, weight.options().dtype(at::kByte))),
        losses_(at::zeros({n_}, weight.options())),
        lo_(plan.dynamic_groups ? at::empty_like(scales_) : scales_),
        hi_(plan.dynamic_groups ? at::empty_like(scales_) : scales_) {}

  SweepResult run(Grid& grid) {
    for (int64_t first = 0, last = 0; first < k_; first = last) {
      last = std::min(first + plan_.block_size, k_);
      if (plan_.dynamic_groups) {
        const int64_t group_start = first / plan_.group_size * plan_.group_size;
        last = std::min(last, group_start + plan_.group_size);
        if (first == group_start) {
          set_group_grid(first, std::min(plan_.group_size, k_ - first));
        }
      }
      sweep_block(first, last - first);
    }
    if (plan_.dynamic_groups) {
      check_scales(scales_, lo_, hi_, plan_.rule);
      grid.scales.copy_(scales_);
      grid.zeros.copy_(zeros_);
    }
    return {at::empty({n_, k_}, codes_.options()).index_copy_(1, order_, codes_.t()), losses_.to(at::kDouble)};
  }

 private:
  const T* column(const at::Tensor& columns, int64_t first) const { return columns.const_data_ptr<T>() + first * n_; }
  T* column_to_write(const at::Tensor& columns, int64_t first) const { return columns.data_ptr<T>() + first * n_; }
  // M from (column, column) on.
  const T* corner(int64_t column) const { return multipliers_.const_data_ptr<T>() + column * (k_ + 1); }

  // start + what the columns [from, first) bring to the columns [first, first + count).
  at::Tensor pulled(const at::Tensor& start, int64_t from, int64_t first, int64_t count) const {
    return from == first ? start
                         : at::addmm(start, multipliers_.narrow(0, first, count).narrow(1, from, first - from),
                                     errors_.narrow(0, from, first - from));
  }

  void sweep_block(int64_t first, int64_t count) const {
    const at::Tensor targets = pulled(weights_.narrow(0, first, count), 0, first, count);
    kernels_.sweep({n_, count, corner(first), k_, targets.const_data_ptr<T>(), column(weights_, first),
                    column_to_write(errors_, first), codes_.data_ptr<uint8_t>() + first * n_,
                    pivots_.const_data_ptr<T>() + first, damping_.const_data_ptr<T>() + first,
                    order_.const_data_ptr<int64_t>() + first, plan_.group_size, scales_.const_data_ptr<T>(),
                    zeros_.const_data_ptr<T>(), static_cast<T>(plan_.rule.max_code()), losses_.data_ptr<T>()});
  }

  // What the published form has added to the weights of a group before it sweeps them: X with X M_gg = S, where S is
  // what the columns before the group bring. -X is left in the errors of the group, which are free until it is swept.
  at::Tensor solved_updates(int64_t group, int64_t size) const {
    if (group == 0) {
      return at::zeros({size, n_}, weights_.options());
    }
    const at::Tensor updates = multipliers_.narrow(0, group, size).narrow(1, 0, group).mm(errors_.narrow(0, 0, group));
    for (int64_t first = group; first < group + size; first += plan_.block_size) {
      const int64_t count = std::min(plan_.block_size, group + size - first);
      const at::Tensor block = pulled(updates.narrow(0, first - group, count), group, first, count);
      kernels_.solve({n_, count, corner(first), k_, block.const_data_ptr<T>(), column_to_write(errors_, first)});
    }
    return errors_.narrow(0, group, size).neg();
  }

  // Scales of a group from its weights with all updates so far.
  void set_group_grid(int64_t first, int64_t count) {
    const at::Tensor updated = solved_updates(first, count).add_(weights_.narrow(0, first, count));
    const int64_t group = first / plan_.group_size;
    const at::Tensor lo = updated.amin(0), hi = updated.amax(0);
    const GridPoints points = minmax_grid_points(lo, hi, plan_.rule);
    lo_.select(0, group).copy_(lo);
    hi_.select(0, group).copy_(hi);
    scales_.select(0, group).copy_(points.scales);
    zeros_.select(0, group).copy_(points.zeros);
  }

  const DeviceKernels<T>& kernels_;
  const Plan& plan_;
  at::Tensor multipliers_, order_, weights_;
  int64_t n_ = weights_.size(1), k_ = weights_.size(0);
  at::Tensor pivots_, damping_, scales_, zeros_, errors_, codes_, losses_;
  at::Tensor lo_, hi_;  // ranges of dynamic groups
};

}  // namespace

template <typename T>
SweepResult sweep_on_device(const DeviceKernels<T>& kernels, const at::Tensor& weight, const Factor& factor,
                            const Plan& plan, Grid& grid) {
  return DeviceSweep<T>(kernels, weight, factor, plan, grid).run(grid);
}

template SweepResult sweep_on_device(const DeviceKernels<float>&, const at::Tensor&, const Factor&, const Plan&, Grid&);
template SweepResult sweep_on_device(const DeviceKernels<double>&, const at::Tensor&, const Factor&, const Plan&,
                                     Grid&);

}  // namespace gptq
