#include "gptq/split_w8.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "gptq/linear_w4.h"
#include "gptq/pack_w4.h"
#include "tests/ops/expect_error.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

struct W8Weight {
  at::Tensor codes, scales, zeros;

  W8Weight(int64_t n, int64_t k, int64_t group_size) {
    const int64_t groups = group_size == -1 ? (k > 0) : k / group_size;
    codes = at::randint(0, 256, {n, k}, at::kByte);
    scales = (at::randn({groups, n}) * 0.02).to(at::kHalf);
    zeros = at::randint(0, 256, {groups, n}, at::kByte);
  }

  at::Tensor dequantize() const {
    const int64_t repeats = codes.size(1) / std::max<int64_t>(1, scales.size(0));
    const auto per_column = [&](const at::Tensor& table) {
      return table.to(at::kDouble).repeat_interleave(repeats, 0).t();
    };
    return (codes.to(at::kDouble) - per_column(zeros)) * per_column(scales);
  }
};

TEST(SplitW8, StandsForTheSameWeightExactly) {
  for (const auto& shape : shapes::kAwkward) {
    for (const int64_t group_size : {int64_t{-1}, int64_t{1}, shape.k}) {
      if (shape.k == 0) continue;
      const W8Weight weight(shape.n, shape.k, group_size);
      const SplitW8 split = split_w8(weight.codes, weight.scales, weight.zeros, group_size);
      ASSERT_EQ(split.codes.sizes(), at::IntArrayRef({shape.n, 2 * shape.k}));
      const at::Tensor planes = dequantize_w4(pack_w4(split.codes), split.scales, split.zeros, 2 * shape.k,
                                              group_size == -1 ? shape.k : group_size);
      const auto halves = planes.to(at::kDouble).split(shape.k, 1);
      EXPECT_TRUE(at::equal(halves[0] + halves[1], weight.dequantize())) << shape.n << " x " << shape.k;
    }
  }
}

TEST(SplitW8, RunsThroughLinearW4) {
  for (const int64_t group_size : {-1, 64, 7}) {
    const int64_t k = group_size == 7 ? 203 : 192;
    const W8Weight weight(37, k, group_size);
    const SplitW8 split = split_w8(weight.codes, weight.scales, weight.zeros, group_size);
    const at::Tensor x = at::randn({5, k});
    const at::Tensor y = linear_w4(at::cat({x, x}, 1), pack_w4(split.codes), split.scales, split.zeros, {}, {},
                                   group_size == -1 ? k : group_size);
    const at::Tensor expected = x.to(at::kDouble).mm(weight.dequantize().t());
    // Each of the 2k terms is rounded like one of an f32 sum (see linear_w4's own tests); high and low halves are each
    // at most 16 scales of 15, so that no term is above 240 |x| |scale|.
    const double bound = 2 * static_cast<double>(k) * 240 * x.abs().max().item<double>() *
                         weight.scales.abs().max().item<double>() * 0x1p-22;
    EXPECT_LE((y - expected).abs().max().item<double>(), bound) << group_size;
  }
}

TEST(SplitW8, SaysWhatIsWrong) {
  const W8Weight good(6, 12, 4);
  const auto with_group = [&](int64_t group_size) { return split_w8(good.codes, good.scales, good.zeros, group_size); };
  EXPECT_ERROR(with_group(5), "group_size must be -1 or divide the 12 columns of codes, got 5");
  EXPECT_ERROR(with_group(0), "group_size must be -1 or divide the 12 columns of codes, got 0");
  EXPECT_ERROR(with_group(6), "scales must be [n_groups, N] = [2, 6], got [3, 6]");
  EXPECT_ERROR(split_w8(good.codes.to(at::kInt), good.scales, good.zeros, 4), "codes must be Byte, got Int");
  EXPECT_ERROR(split_w8(good.codes.flatten(), good.scales, good.zeros, 4), "codes must have two dimensions, got [72]");
  EXPECT_ERROR(split_w8(good.codes, good.scales, good.zeros.slice(1, 1), 4),
               "zeros must be [n_groups, N] = [3, 6], got [3, 5]");
  EXPECT_ERROR(split_w8(good.codes, at::full_like(good.scales, 4096), good.zeros, 4),
               "scales must be at most 4094, since 16 times as much is stored in float16, got 4096");
}

}  // namespace
}  // namespace gptq
