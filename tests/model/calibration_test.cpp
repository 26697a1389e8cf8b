#include "model/calibration.h"

#include <numeric>

#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

std::vector<int64_t> count_up(int64_t count) {
  std::vector<int64_t> ids(static_cast<size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

TEST(Calibration, WindowsAreRunsOfTheText) {
  const at::Tensor windows = draw_windows(count_up(1000), 50, 17, 3);
  EXPECT_EQ(windows.sizes(), (std::vector<int64_t>{50, 17}));
  const at::Tensor starts = windows.select(1, 0).unsqueeze(1);
  EXPECT_TRUE(at::equal(windows, starts + at::arange(17)));
  EXPECT_LE(starts.max().item<int64_t>(), 983);
}

// The numbers follow from the C++ standard's definition of mt19937_64 (its 10000th value is fixed by it): the first
// draws with seed 5489, modulo 984 starts, none rejected.
TEST(Calibration, DrawsAreTheSameOnEveryMachine) {
  const at::Tensor starts = draw_windows(count_up(1000), 2, 17, 5489).select(1, 0);
  EXPECT_EQ(starts[0].item<int64_t>(), static_cast<int64_t>(14514284786278117030ull % 984));
  EXPECT_EQ(starts[1].item<int64_t>(), static_cast<int64_t>(4620546740167642908ull % 984));
  EXPECT_FALSE(at::equal(starts, draw_windows(count_up(1000), 2, 17, 5490).select(1, 0)));
}

TEST(Calibration, EveryStartIsDrawn) {
  const at::Tensor starts = draw_windows(count_up(10), 500, 4, 0).select(1, 0);
  EXPECT_TRUE(at::equal(std::get<0>(at::_unique(starts)), at::arange(7)));
  EXPECT_TRUE(at::equal(draw_windows(count_up(4), 2, 4, 0), at::arange(4).expand({2, 4})));
}

TEST(Calibration, BatchesAreTheTensorsOfAFileByName) {
  const test::TempFolder folder;
  const std::string path = folder.path("inputs.safetensors");
  save_safetensors(path, {{"b", at::full({2, 3}, 2)}, {"a", at::full({4}, 1, at::kLong)}});
  const std::vector<at::Tensor> batches = read_batches(path);
  ASSERT_EQ(batches.size(), 2u);
  EXPECT_TRUE(at::equal(batches[0], at::full({4}, 1, at::kLong)));
  EXPECT_TRUE(at::equal(batches[1], at::full({2, 3}, 2)));
  save_safetensors(path, {});
  EXPECT_ERROR(read_batches(path), "inputs.safetensors: must hold at least one tensor, has none");
}

TEST(Calibration, Errors) {
  EXPECT_ERROR(draw_windows(count_up(16), 1, 17, 0), "at least one window of 17 tokens, has 16");
  EXPECT_ERROR(draw_windows({}, 1, 1, 0), "has 0");
  EXPECT_ERROR(draw_windows(count_up(9), 0, 1, 0), "samples must be at least 1, got 0");
  EXPECT_ERROR(draw_windows(count_up(9), 1, 0, 0), "sequence_length must be at least 1, got 0");
}

}  // namespace
}  // namespace gptq
