#include "quant/grid.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>

namespace gptq {
namespace {

constexpr float kSmallestHalf = 5.9604644775390625e-8f;  // 2^-24

struct Range {
  double lo = 0;
  double hi = 0;

  void include(double value) {
    lo = std::min(lo, value);
    hi = std::max(hi, value);
  }
};

// [N, n_groups or K] in column order of the weight, from [n_groups, N].
at::Tensor per_column(const at::Tensor& per_group, int64_t k, int64_t group_size) {
  const at::Tensor group = at::arange(k, at::kLong).div(group_size, "floor");
  return per_group.t().index_select(1, group);
}

template <typename T>
Range range_of(const T* values, int64_t count) {
  T lo = 0, hi = 0;
  for (int64_t i = 0; i < count; ++i) {
    lo = values[i] < lo ? values[i] : lo;
    hi = values[i] > hi ? values[i] : hi;
  }
  return {static_cast<double>(lo), static_cast<double>(hi)};
}

template <typename T>
void fill_grid(const T* weight, int64_t n, int64_t k, Grid& grid) {
  auto* scales = grid.scales.data_ptr<c10::Half>();
  auto* zeros = grid.zeros.data_ptr<uint8_t>();
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t start = 0, group = 0; start < k; start += grid.group_size, ++group) {
        const Range range = range_of(weight + row * k + start, std::min(grid.group_size, k - start));
        const GridPoint point = minmax_grid_point(range.lo, range.hi, grid.rule);
        scales[group * n + row] = c10::Half(point.scale);
        zeros[group * n + row] = point.zero;
      }
    }
  });
}

}  // namespace

GridPoint minmax_grid_point(double lo, double hi, const GridRule& rule) {
  const auto max_code = static_cast<double>(rule.max_code());
  const auto middle = static_cast<uint8_t>((rule.max_code() + 1) / 2);
  lo = std::min(lo, 0.0);
  hi = std::max(hi, 0.0);
  const double span = rule.symmetric ? 2 * std::max(-lo, hi) : hi - lo;
  if (span == 0) {
    return {1.0f, rule.symmetric ? middle : uint8_t{0}};
  }
  float scale = c10::Half(static_cast<float>(span / max_code));
  TORCH_CHECK(std::isfinite(scale), "quantize_weight: weight has a group that spans ", span,
              ", which needs a scale of ", span / max_code, "; scales are float16, at most 65504");
  scale = std::max(scale, kSmallestHalf);
  if (rule.symmetric) {
    return {scale, middle};
  }
  return {scale, static_cast<uint8_t>(std::clamp(std::nearbyint(-lo / scale), 0.0, max_code))};
}

Grid minmax_grid(const at::Tensor& weight, const Plan& plan) {
  const int64_t n = weight.size(0), k = weight.size(1);
  const int64_t n_groups = (k + plan.group_size - 1) / plan.group_size;
  Grid grid{plan.rule, plan.group_size, at::empty({n_groups, n}, at::kHalf), at::empty({n_groups, n}, at::kByte)};
  if (plan.per_tensor) {
    const GridPoint point = minmax_grid_point(weight.min().item<double>(), weight.max().item<double>(), plan.rule);
    grid.scales.fill_(point.scale);
    grid.zeros.fill_(point.zero);
    return grid;
  }
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "minmax_grid",
                             [&] { fill_grid(weight.const_data_ptr<scalar_t>(), n, k, grid); });
  return grid;
}

at::Tensor round_to_grid(const at::Tensor& weight, const Grid& grid) {
  const int64_t k = weight.size(1);
  const at::Tensor zeros = per_column(grid.zeros, k, grid.group_size);
  at::Tensor codes = weight.div(per_column(grid.scales, k, grid.group_size).to(weight.scalar_type()));
  return codes.round_().add_(zeros).clamp_(0, grid.rule.max_code()).to(at::kByte);
}

at::Tensor dequantize_codes(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros,
                            int64_t group_size, at::ScalarType dtype) {
  const int64_t k = codes.size(1);
  const int64_t columns = group_size == -1 ? k : group_size;
  at::Tensor values = codes.to(dtype).sub_(per_column(zeros, k, columns));
  return values.mul_(per_column(scales, k, columns));
}

}  // namespace gptq
