#include "quant/plan.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/error_of.h"

namespace gptq {
namespace {

template <typename Field, typename Value>
void expect_error(Field QuantizeOptions::* field, Value value, const char* part) {
  QuantizeOptions options;
  options.*field = value;
  EXPECT_PRED_FORMAT2(testing::IsSubstring, part, test::error_of([&] { make_plan(options, 64); }));
}

TEST(Plan, RejectsBadOptions) {
  expect_error(&QuantizeOptions::bits, 1, "bits must be in 2..8, got 1");
  expect_error(&QuantizeOptions::bits, 9, "bits must be in 2..8, got 9");
  expect_error(&QuantizeOptions::group_size, 0, "group_size must be at least 1, or -1 for one group per row, got 0");
  expect_error(&QuantizeOptions::group_size, -2, "got -2");
  expect_error(&QuantizeOptions::mode, "gptq", "mode must be \"default\", \"classic\" or \"rtn\", got \"gptq\"");
  expect_error(&QuantizeOptions::act_order, "on",
               "act_order must be \"auto\", \"off\", \"static\" or \"dynamic\", got \"on\"");
  expect_error(&QuantizeOptions::damping, -0.01, "damping must be finite and at least 0, got -0.01");
  expect_error(&QuantizeOptions::damping, std::nan(""), "damping must be finite and at least 0, got nan");
  expect_error(&QuantizeOptions::damping, INFINITY, "got inf");
  expect_error(&QuantizeOptions::scale_search, "mse",
               "scale_search must be \"auto\", \"minmax\" or \"weighted\", got \"mse\"");
  expect_error(&QuantizeOptions::refine_sweeps, -1, "refine_sweeps must be at least 0, got -1");
  expect_error(&QuantizeOptions::min_samples, -1, "min_samples must be at least 0, got -1");
  expect_error(&QuantizeOptions::block_size, 0, "block_size must be at least 1, got 0");
}

TEST(Plan, ResolvesOrderAndGroups) {
  QuantizeOptions options;
  EXPECT_TRUE(make_plan(options, 300).by_diagonal);
  EXPECT_FALSE(make_plan(options, 300).dynamic_groups);
  EXPECT_EQ(make_plan(options, 300).group_size, 128);
  EXPECT_EQ(make_plan(options, 100).group_size, 100);
  options.mode = "classic";
  EXPECT_FALSE(make_plan(options, 300).by_diagonal);
  EXPECT_TRUE(make_plan(options, 300).dynamic_groups);
  options.act_order = "static";
  EXPECT_TRUE(make_plan(options, 300).by_diagonal);
  EXPECT_FALSE(make_plan(options, 300).dynamic_groups);
  options.act_order = "dynamic";
  EXPECT_TRUE(make_plan(options, 300).by_diagonal);
  EXPECT_TRUE(make_plan(options, 300).permute);
  EXPECT_TRUE(make_plan(options, 300).dynamic_groups);
  options.act_order = "off";
  options.per_tensor = true;
  EXPECT_FALSE(make_plan(options, 300).dynamic_groups);
  EXPECT_EQ(make_plan(options, 300).group_size, 300);
  options.mode = "rtn";
  EXPECT_FALSE(make_plan(options, 300).sweep);
}

TEST(Plan, OnlyModeDefaultDoesMoreThanThePublishedAlgorithm) {
  QuantizeOptions options;
  options.search_damping = true;
  for (const char* mode : {"default", "classic", "rtn"}) {
    options.mode = mode;
    const Plan plan = make_plan(options, 300);
    const bool ours = options.mode == "default";
    EXPECT_EQ(plan.weighted_scales, ours) << mode;
    EXPECT_EQ(plan.row_guard, ours) << mode;
    EXPECT_EQ(plan.search_damping, ours) << mode;
    EXPECT_EQ(plan.refine_sweeps, ours ? options.refine_sweeps : 0) << mode;
    EXPECT_EQ(plan.target_alpha, ours ? options.target_alpha : 0) << mode;
  }
  options.scale_search = "weighted";
  EXPECT_TRUE(make_plan(options, 300).weighted_scales);
  options.per_tensor = true;
  EXPECT_FALSE(make_plan(options, 300).weighted_scales);
}

}  // namespace
}  // namespace gptq
