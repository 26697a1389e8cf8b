#include "quant/scale_search.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "quant/scale_search_kernel.h"
#include "quant/strips.h"

namespace gptq {
namespace {

template <typename T>
void search_strips(const at::Tensor& weight, const at::Tensor& importance, Grid& grid) {
  constexpr int64_t rows = kStripRows<T>;
  const int64_t n = weight.size(0), k = weight.size(1);
  const auto dtype = weight.scalar_type();
  const at::Tensor weights = to_strips<T>(weight, 0),
                   shares = importance.div(importance.max().clamp_min(1e-30)).to(dtype).contiguous();
  const at::Tensor scales = to_strips<T>(grid.scales.t().to(dtype), 1),
                   zeros = to_strips<T>(grid.zeros.t().to(dtype), 0);
  at::parallel_for(0, weights.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      for (int64_t first = 0, group = 0; first < k; first += grid.group_size, ++group) {
        search_scales({std::min(grid.group_size, k - first), strip_data<T>(weights, strip) + first * rows,
                       shares.const_data_ptr<T>() + first, static_cast<T>(grid.rule.max_code()), grid.rule.symmetric,
                       strip_data<T>(scales, strip) + group * rows, strip_data<T>(zeros, strip) + group * rows});
      }
    }
  });
  grid.scales.copy_(from_strips(scales, n).t());
  grid.zeros.copy_(from_strips(zeros, n).t());
}

}  // namespace

void search_grid(const at::Tensor& weight, const at::Tensor& importance, Grid& grid) {
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "search_grid",
                             [&] { search_strips<scalar_t>(weight, importance, grid); });
}

}  // namespace gptq
