#include "quant/grid_device.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "quant/read_scalars.h"

namespace gptq {
namespace {

constexpr double kSmallestHalf = 5.9604644775390625e-8;  // 2^-24

// reduce(the columns of a group) for every group, [n_groups, N].
template <typename Reduce>
at::Tensor per_group(const at::Tensor& weight, int64_t group_size, const Reduce& reduce) {
  const int64_t n = weight.size(0), k = weight.size(1), whole = k / group_size * group_size;
  const at::Tensor groups = reduce(weight.narrow(1, 0, whole).unflatten(1, {k / group_size, group_size}));
  const at::Tensor all =
      whole < k ? at::cat({groups, reduce(weight.narrow(1, whole, k - whole).view({n, 1, k - whole}))}, 1) : groups;
  return all.t().contiguous();
}

}  // namespace

GridPoints minmax_grid_points(const at::Tensor& lo, const at::Tensor& hi, const GridRule& rule) {
  const auto max_code = static_cast<double>(rule.max_code());
  const at::Tensor below = lo.to(at::kDouble).neg().clamp_min_(0), above = hi.to(at::kDouble).clamp_min_(0);
  const at::Tensor span = rule.symmetric ? at::maximum(below, above).mul_(2) : below.add(above);
  const at::Tensor scale = span.div(max_code).to(at::kFloat).to(at::kHalf).to(at::kDouble).clamp_min_(kSmallestHalf);
  const at::Tensor zeros = rule.symmetric ? at::zeros_like(span).fill_((rule.max_code() + 1) / 2)
                                          : below.div(scale).round_().clamp_(0, max_code);
  return {at::where(span.eq(0), 1.0, scale).to(lo.scalar_type()), zeros.to(lo.scalar_type())};
}

void check_scales(const at::Tensor& scales, const at::Tensor& lo, const at::Tensor& hi, const GridRule& rule) {
  const at::Tensor usable = scales.isfinite();
  if (usable.all().item<bool>()) {
    return;
  }
  const at::Tensor first = usable.logical_not().flatten().nonzero()[0][0];
  const auto [least, most] = read_scalars(lo.flatten().index({first}), hi.flatten().index({first}));
  minmax_grid_point(least, most, rule);
}

at::Tensor of_entries(const at::Tensor& table, int64_t group_size, int64_t k) {
  return table.repeat_interleave(group_size, 0, table.size(0) * group_size).narrow(0, 0, k);
}

Grid minmax_grid_on_device(const at::Tensor& weight, const Plan& plan) {
  const at::Tensor lo = per_group(weight, plan.group_size, [](const at::Tensor& group) { return group.amin(2); });
  const at::Tensor hi = per_group(weight, plan.group_size, [](const at::Tensor& group) { return group.amax(2); });
  const GridPoints points = minmax_grid_points(lo, hi, plan.rule);
  check_scales(points.scales, lo, hi, plan.rule);
  return {plan.rule, plan.group_size, points.scales.to(at::kHalf), points.zeros.to(at::kByte)};
}

at::Tensor round_to_grid_on_device(const at::Tensor& weight, const Grid& grid) {
  const int64_t k = weight.size(1);
  const auto of_all = [&](const at::Tensor& table) {
    return of_entries(table.to(weight.scalar_type()), grid.group_size, k).t();
  };
  const at::Tensor zeros = of_all(grid.zeros).contiguous();
  const at::Tensor least = zeros.neg(), most = least.add(static_cast<double>(grid.rule.max_code()));
  return weight.div(of_all(grid.scales).contiguous()).clamp_(least, most).round_().add_(zeros).to(at::kByte);
}

at::Tensor dequantize_codes_on_device(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros,
                                      int64_t group_size, at::ScalarType dtype) {
  const int64_t k = codes.size(1);
  const auto of_all = [&](const at::Tensor& table) { return of_entries(table, group_size, k).t().to(dtype); };
  return codes.to(dtype).sub(of_all(zeros)).mul_(of_all(scales)).contiguous();
}

}  // namespace gptq
