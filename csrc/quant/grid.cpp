#include "quant/grid.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>

#include "quant/device_kernels.h"
#include "quant/grid_device.h"
#include "quant/read_scalars.h"

namespace gptq {
namespace {

constexpr float kSmallestHalf = 5.9604644775390625e-8f;  // 2^-24

struct Range {
  double lo;
  double hi;
};

// Calls body(row, group, first column, number of columns) for every group of every row, in parallel over rows.
template <typename Body>
void for_each_group(int64_t n, int64_t k, int64_t group_size, const Body& body) {
  at::parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t first = 0, group = 0; first < k; first += group_size, ++group) {
        body(row, group, first, std::min(group_size, k - first));
      }
    }
  });
}

// Several ranges side by side, which vectorises, since the least of two values does not depend on their order.
template <typename T>
Range range_of(const T* values, int64_t count) {
  constexpr int64_t width = 16;
  T lo[width] = {}, hi[width] = {};
  const auto include = [&](int64_t lane, T value) {
    lo[lane] = value < lo[lane] ? value : lo[lane];
    hi[lane] = value > hi[lane] ? value : hi[lane];
  };
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    for (int64_t lane = 0; lane < width; ++lane) {
      include(lane, values[i + lane]);
    }
  }
  for (; i < count; ++i) {
    include(0, values[i]);
  }
  return {static_cast<double>(*std::min_element(lo, lo + width)),
          static_cast<double>(*std::max_element(hi, hi + width))};
}

template <typename T>
void fill_grid(const T* weight, int64_t n, int64_t k, Grid& grid) {
  auto* scales = grid.scales.data_ptr<c10::Half>();
  auto* zeros = grid.zeros.data_ptr<uint8_t>();
  for_each_group(n, k, grid.group_size, [&](int64_t row, int64_t group, int64_t first, int64_t count) {
    const Range range = range_of(weight + row * k + first, count);
    const GridPoint point = minmax_grid_point(range.lo, range.hi, grid.rule);
    scales[group * n + row] = c10::Half(point.scale);
    zeros[group * n + row] = point.zero;
  });
}

template <typename T>
void fill_codes(const T* weight, int64_t n, int64_t k, const Grid& grid, uint8_t* codes) {
  // Adding and subtracting it rounds to integer, half to even, and unlike nearbyint it vectorises everywhere.
  constexpr T rounder = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52
  const auto* scales = grid.scales.const_data_ptr<c10::Half>();
  const auto* zeros = grid.zeros.const_data_ptr<uint8_t>();
  for_each_group(n, k, grid.group_size, [&](int64_t row, int64_t group, int64_t first, int64_t count) {
    const T scale = static_cast<float>(scales[group * n + row]), zero = zeros[group * n + row];
    const T least = -zero, most = static_cast<T>(grid.rule.max_code()) - zero;
    const T* values = weight + row * k + first;
    uint8_t* out = codes + row * k + first;
    for (int64_t i = 0; i < count; ++i) {
      T level = values[i] / scale;
      level = level > least ? level : least;
      level = level < most ? level : most;
      out[i] = static_cast<uint8_t>(static_cast<int32_t>((level + rounder) - rounder + zero));
    }
  });
}

template <typename T>
void fill_values(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros, int64_t group_size,
                 T* values) {
  const int64_t n = codes.size(0), k = codes.size(1);
  const auto* code = codes.const_data_ptr<uint8_t>();
  const auto* scale = scales.const_data_ptr<c10::Half>();
  const auto* zero = zeros.const_data_ptr<uint8_t>();
  for_each_group(n, k, group_size, [&](int64_t row, int64_t group, int64_t first, int64_t count) {
    const T step = static_cast<float>(scale[group * n + row]);
    const int32_t shift = zero[group * n + row];
    for (int64_t i = row * k + first; i < row * k + first + count; ++i) {
      values[i] = static_cast<T>(code[i] - shift) * step;
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
  if (solved_on_device(weight) && !plan.per_tensor) {
    return minmax_grid_on_device(weight, plan);
  }
  const int64_t n = weight.size(0), k = weight.size(1);
  const int64_t n_groups = (k + plan.group_size - 1) / plan.group_size;
  const auto table = [&](at::ScalarType dtype) { return at::empty({n_groups, n}, weight.options().dtype(dtype)); };
  Grid grid{plan.rule, plan.group_size, table(at::kHalf), table(at::kByte)};
  if (plan.per_tensor) {
    const auto [least, most] = read_scalars(weight.min(), weight.max());
    const GridPoint point = minmax_grid_point(least, most, plan.rule);
    grid.scales.fill_(point.scale);
    grid.zeros.fill_(point.zero);
    return grid;
  }
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "minmax_grid",
                             [&] { fill_grid(weight.const_data_ptr<scalar_t>(), n, k, grid); });
  return grid;
}

at::Tensor round_to_grid(const at::Tensor& weight, const Grid& grid) {
  if (solved_on_device(weight)) {
    return round_to_grid_on_device(weight, grid);
  }
  at::Tensor codes = at::empty(weight.sizes(), at::kByte);
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "round_to_grid", [&] {
    fill_codes(weight.const_data_ptr<scalar_t>(), weight.size(0), weight.size(1), grid, codes.data_ptr<uint8_t>());
  });
  return codes;
}

at::Tensor dequantize_codes(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros,
                            int64_t group_size, at::ScalarType dtype) {
  group_size = group_size == -1 ? codes.size(1) : group_size;
  if (!codes.is_cpu() || solved_on_device(codes)) {
    return dequantize_codes_on_device(codes, scales, zeros, group_size, dtype);
  }
  at::Tensor values = at::empty(codes.sizes(), dtype);
  AT_DISPATCH_FLOATING_TYPES(dtype, "dequantize_codes", [&] {
    fill_values(codes.contiguous(), scales.contiguous(), zeros.contiguous(), group_size, values.data_ptr<scalar_t>());
  });
  return values;
}

}  // namespace gptq
