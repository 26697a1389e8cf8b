#include "quant/scale_search.h"

#include <gtest/gtest.h>

#include "tests/quant/plain_options.h"
#include "tests/quant/random_layer.h"
#include "tests/reference.h"

namespace gptq {
namespace {

using reference::Matrix;

struct Setting {
  int64_t n, k, bits, group_size;
  bool symmetric;
};

// Around strips of 64 rows, odd groups, one column, every width of code.
const Setting kSettings[] = {{1, 1, 4, 128, true},   {63, 7, 4, 3, true},    {64, 33, 3, 32, false},
                             {65, 40, 2, 16, true},  {5, 129, 4, 128, true}, {31, 64, 8, 64, true},
                             {17, 50, 2, 50, false}, {3, 31, 4, 1, true},    {130, 20, 4, 20, false},
                             {2, 300, 3, -1, true}};

class ScaleSearch : public testing::TestWithParam<Setting> {
 protected:
  double score(const Matrix& w, const std::vector<double>& importance, const Grid& grid, int64_t row, int64_t group) {
    const int64_t first = group * grid.group_size;
    return reference::group_score(w, importance, row, first, std::min(first + grid.group_size, w.cols),
                                  grid.scales[group][row].item<double>(), grid.zeros[group][row].item<double>(),
                                  static_cast<double>(grid.rule.max_code()));
  }
};

TEST_P(ScaleSearch, ComesCloseToTheBestScaleThereIs) {
  const auto [n, k, bits, group_size, symmetric] = GetParam();
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    const test::RandomLayer layer = test::random_layer(n, k, 900 + n + k);
    const at::Tensor weight = layer.weight.to(dtype), importance = layer.hessian.diagonal().contiguous();
    QuantizeOptions options = test::plain_options();
    options.bits = bits;
    options.group_size = group_size;
    options.symmetric = symmetric;
    const Grid before = minmax_grid(weight, make_plan(options, k));
    Grid grid = minmax_grid(weight, make_plan(options, k));
    search_grid(weight, importance, grid);

    const Matrix w(weight);
    const std::vector<double> shares(importance.data_ptr<double>(), importance.data_ptr<double>() + k);
    double total = 0, total_before = 0, total_best = 0;
    for (int64_t row = 0; row < n; ++row) {
      for (int64_t group = 0; group < grid.scales.size(0); ++group) {
        const double found = score(w, shares, grid, row, group), minmax = score(w, shares, before, row, group);
        // Scores are summed in float32 there, up to 300 terms.
        EXPECT_LE(found, minmax * (1 + 1e-4) + 1e-12) << row << " " << group;
        double best = minmax;
        const auto first = group * grid.group_size;
        for (int64_t step = 1; step <= 600; ++step) {
          const double size = before.scales[group][row].item<double>() * 1.5 * static_cast<double>(step) / 600;
          for (const double scale : {size, -size}) {
            if (scale > 0 || symmetric) {
              best = std::min(best, reference::group_score(w, shares, row, first, std::min(first + grid.group_size, k),
                                                           scale, before.zeros[group][row].item<double>(),
                                                           static_cast<double>(grid.rule.max_code())));
            }
          }
        }
        total += found;
        total_before += minmax;
        total_best += best;
      }
    }
    // The search tries 40 scales and refits; the reference 1,200 of higher precision than float16.
    EXPECT_LE(total, 0.25 * total_before + 0.85 * total_best + 1e-6 * static_cast<double>(n * k)) << dtype;
    EXPECT_TRUE(grid.scales.isfinite().logical_and(grid.scales.ne(0)).all().item<bool>());
    if (symmetric) {
      EXPECT_TRUE(grid.zeros.equal(before.zeros));
    } else {
      EXPECT_TRUE(grid.scales.gt(0).all().item<bool>());
      EXPECT_LE(grid.zeros.max().item<int64_t>(), grid.rule.max_code());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, ScaleSearch, testing::ValuesIn(kSettings));

TEST(ScaleSearchEdges, ZerosTinyAndLoneWeightsKeepAUsableScale) {
  at::Tensor weight = at::zeros({3, 8});
  weight[1].fill_(1e-7);
  weight[2][3] = -2;
  const Plan plan = make_plan(test::plain_options(), 8);
  Grid grid = minmax_grid(weight, plan);
  const at::Tensor before = grid.scales.clone();
  search_grid(weight, at::ones({8}, at::kDouble), grid);
  EXPECT_EQ(grid.scales[0][0].item<float>(), 1);
  EXPECT_TRUE(grid.scales[0][1].equal(before[0][1]));  // below the normal numbers of float16
  const at::Tensor values =
      dequantize_codes(round_to_grid(weight, grid), grid.scales, grid.zeros, grid.group_size, at::kFloat);
  EXPECT_EQ(values[0].abs().max().item<float>(), 0);
  EXPECT_NEAR(values[2][3].item<float>(), -2, 2e-3);  // a float16 scale
}

TEST(ScaleSearchEdges, TheCodeWithoutAnOppositeCoversTheLargerExtreme) {
  at::Tensor weight = at::zeros({2, 16});
  for (int64_t i = 0; i < 16; ++i) {
    weight[0][i] = static_cast<double>(i - 8) / 8;   // -1 .. 7/8: exact with scale 1/8
    weight[1][i] = -static_cast<double>(i - 8) / 8;  // the mirror image: exact with scale -1/8
  }
  Grid grid = minmax_grid(weight, make_plan(test::plain_options(), 16));
  search_grid(weight, at::ones({16}, at::kDouble), grid);
  EXPECT_EQ(grid.scales[0][0].item<float>(), 0.125f);
  EXPECT_EQ(grid.scales[0][1].item<float>(), -0.125f);
}

}  // namespace
}  // namespace gptq
