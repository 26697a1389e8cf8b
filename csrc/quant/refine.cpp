#include "quant/refine.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>

#include "quant/refine_kernel.h"
#include "quant/strips.h"

namespace gptq {
namespace {

// [n_groups, N] as [N, K]: the value of each column's group.
at::Tensor by_column(const at::Tensor& groups, int64_t group_size, int64_t k) {
  return groups.t().repeat_interleave(group_size, 1).narrow(1, 0, k);
}

template <typename T>
void refine_strips(const at::Tensor& weight, const at::Tensor& damped, int64_t sweeps, bool fit_scales, Grid& grid,
                   at::Tensor& codes) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t n = weight.size(0), k = weight.size(1);
  const auto dtype = weight.scalar_type();
  const at::Tensor zero_of_column = by_column(grid.zeros.to(dtype), grid.group_size, k);
  const at::Tensor level_of_column = codes.to(dtype).sub_(zero_of_column);
  const at::Tensor values = dequantize_codes(codes, grid.scales, grid.zeros, grid.group_size, dtype);
  const at::Tensor errors = to_strips<T>(weight.sub(values), 0), levels = to_strips<T>(level_of_column, 0);
  const at::Tensor scales = to_strips<T>(grid.scales.t().to(dtype), 1),
                   zeros = to_strips<T>(grid.zeros.t().to(dtype), 0);
  at::parallel_for(0, errors.size(0), 1, [&](int64_t begin, int64_t end) {
    const int64_t widest = std::min(grid.group_size, k);
    const at::Tensor gradients = at::empty({widest, rows}, errors.options()), changes = at::empty_like(gradients);
    for (int64_t strip = begin; strip < end; ++strip) {
      for (int64_t step = 0; step < sweeps; ++step) {
        for (int64_t first = 0, group = 0; first < k; first += grid.group_size, ++group) {
          refine_group({k, damped.const_data_ptr<T>(), first, std::min(grid.group_size, k - first),
                        static_cast<T>(grid.rule.max_code()), strip_data<T>(errors, strip),
                        strip_data<T>(levels, strip), strip_data<T>(scales, strip) + group * rows,
                        strip_data<T>(zeros, strip) + group * rows, gradients.data_ptr<T>(), changes.data_ptr<T>(),
                        fit_scales});
        }
      }
    }
  });
  grid.scales.copy_(from_strips(scales, n).t());
  codes.copy_(from_strips(levels, n).add(zero_of_column));
}

}  // namespace

void refine_codes(const at::Tensor& weight, const at::Tensor& damped, int64_t sweeps, bool fit_scales, Grid& grid,
                  at::Tensor& codes) {
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "refine_codes",
                             [&] { refine_strips<scalar_t>(weight, damped, sweeps, fit_scales, grid, codes); });
}

}  // namespace gptq
