#include "quant/grid.h"

#include <gtest/gtest.h>

#include "tests/error_of.h"
#include "tests/reference.h"

namespace gptq {
namespace {

Plan plan_of(int64_t bits, int64_t group_size, bool symmetric, int64_t k) {
  QuantizeOptions options;
  options.bits = bits;
  options.group_size = group_size;
  options.symmetric = symmetric;
  return make_plan(options, k);
}

TEST(Grid, EqualsTheReference) {
  for (const int64_t k : {1, 31, 64, 97}) {
    const at::Tensor weight = at::sin(at::arange(7 * k, at::kFloat) * 1.7).view({7, k}) + 0.3;
    for (const int64_t group_size : {1, 5, 32, 96, 97, 500, -1}) {
      for (int64_t bits = 2; bits <= 8; ++bits) {
        for (const bool symmetric : {true, false}) {
          const Grid grid = minmax_grid(weight, plan_of(bits, group_size, symmetric, k));
          const auto expected = reference::make_groups(reference::Matrix(weight), bits, group_size, symmetric);
          EXPECT_EQ(reference::Matrix(grid.scales).values, expected.scales.values);
          EXPECT_EQ(reference::Matrix(grid.zeros).values, expected.zeros.values);
          const at::Tensor codes = round_to_grid(weight, grid);
          const at::Tensor values = dequantize_codes(codes, grid.scales, grid.zeros, grid.group_size, at::kDouble);
          EXPECT_EQ(reference::Matrix(values).values, reference::dequantize(reference::Matrix(codes), expected).values);
        }
      }
    }
  }
}

TEST(Grid, AsymmetricRangeIncludesZero) {
  const GridPoint positive = minmax_grid_point(3, 30, {4, false});
  EXPECT_EQ(positive.scale, 2);
  EXPECT_EQ(positive.zero, 0);
  const GridPoint negative = minmax_grid_point(-30, -3, {4, false});
  EXPECT_EQ(negative.scale, 2);
  EXPECT_EQ(negative.zero, 15);
}

TEST(Grid, ZeroGroupStaysZero) {
  for (const bool symmetric : {true, false}) {
    const at::Tensor weight = at::zeros({3, 10});
    const Grid grid = minmax_grid(weight, plan_of(4, 5, symmetric, 10));
    EXPECT_TRUE(grid.scales.eq(1).all().item<bool>());
    const at::Tensor codes = round_to_grid(weight, grid);
    EXPECT_TRUE(codes.eq(symmetric ? 8 : 0).all().item<bool>());
  }
}

TEST(Grid, TinyAndHugeScales) {
  EXPECT_EQ(minmax_grid_point(-1e-30, 1e-30, {4, true}).scale, 5.9604644775390625e-8f);
  EXPECT_EQ(minmax_grid_point(-1e-30, 1e-300, {2, false}).zero, 0);
  EXPECT_EQ(minmax_grid_point(0, 65504.0 * 15, {4, false}).scale, 65504.0f);
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "scales are float16, at most 65504",
                      test::error_of([] { minmax_grid_point(0, 65520.0 * 15, {4, false}); }));
  EXPECT_PRED_FORMAT2(testing::IsSubstring, "scales are float16",
                      test::error_of([] { minmax_grid_point(-1e300, 1e300, {8, true}); }));
}

}  // namespace
}  // namespace gptq
