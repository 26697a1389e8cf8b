#include "quant/scale_search.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "quant/device_kernels.h"
#include "quant/scale_search_kernel.h"
#include "quant/strips.h"

namespace gptq {
namespace {

// What each column costs, as a share of the most.
at::Tensor shares_of(const at::Tensor& importance, at::ScalarType dtype) {
  return importance.div(importance.max().clamp_min(1e-30)).to(dtype).contiguous();
}

template <typename T>
void search_on_device(const DeviceKernels<T>& kernels, const at::Tensor& weight, const at::Tensor& importance,
                      Grid& grid) {
  const auto dtype = weight.scalar_type();
  const at::Tensor columns = weight.t().contiguous(), shares = shares_of(importance, dtype);
  const at::Tensor scales = grid.scales.to(dtype), zeros = grid.zeros.to(dtype);
  kernels.search_scales({weight.size(0), weight.size(1), grid.group_size, columns.const_data_ptr<T>(),
                         shares.const_data_ptr<T>(), static_cast<T>(grid.rule.max_code()), grid.rule.symmetric,
                         scales.data_ptr<T>(), zeros.data_ptr<T>()});
  grid.scales.copy_(scales);
  grid.zeros.copy_(zeros);
}

template <typename T>
void search_strips(const at::Tensor& weight, const at::Tensor& importance, Grid& grid) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t n = weight.size(0), k = weight.size(1);
  const at::Tensor shares = shares_of(importance, weight.scalar_type());
  const at::Tensor scales = groups_to_strips<T>(grid.scales, 1), zeros = groups_to_strips<T>(grid.zeros, 0);
  at::parallel_for(0, strip_count<T>(n), 1, [&](int64_t begin, int64_t end) {
    const at::Tensor weights = at::empty({grid.group_size, rows}, weight.options());
    for (int64_t strip = begin; strip < end; ++strip) {
      const T* values = weight.const_data_ptr<T>() + strip * rows * k;
      for (int64_t first = 0, group = 0; first < k; first += grid.group_size, ++group) {
        const int64_t count = std::min(grid.group_size, k - first);
        load_strip(values + first, std::min(rows, n - strip * rows), count, k, weights.data_ptr<T>(),
                   [](T value) { return value; });
        search_scales({count, weights.const_data_ptr<T>(), shares.const_data_ptr<T>() + first,
                       static_cast<T>(grid.rule.max_code()), grid.rule.symmetric,
                       strip_data<T>(scales, strip) + group * rows, strip_data<T>(zeros, strip) + group * rows});
      }
    }
  });
  groups_from_strips(scales, grid.scales);
  groups_from_strips(zeros, grid.zeros);
}

}  // namespace

void search_grid(const at::Tensor& weight, const at::Tensor& importance, Grid& grid) {
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "search_grid", [&] {
    if (const auto* kernels = device_kernels<scalar_t>(weight.device().type())) {
      search_on_device<scalar_t>(*kernels, weight, importance, grid);
    } else {
      search_strips<scalar_t>(weight, importance, grid);
    }
  });
}

}  // namespace gptq
