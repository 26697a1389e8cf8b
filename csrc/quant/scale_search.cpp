#include "quant/scale_search.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "quant/scale_search_kernel.h"
#include "quant/strips.h"

namespace gptq {
namespace {

template <typename T>
void search_strips(const at::Tensor& weight, const at::Tensor& importance, Grid& grid) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t n = weight.size(0), k = weight.size(1);
  const at::Tensor shares = importance.div(importance.max().clamp_min(1e-30)).to(weight.scalar_type()).contiguous();
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
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "search_grid",
                             [&] { search_strips<scalar_t>(weight, importance, grid); });
}

}  // namespace gptq
