#include "model/output_error.h"

#include <gtest/gtest.h>
#include <torch/script.h>

#include <limits>

namespace gptq {
namespace {

/// forward(x) = [scale · x, 0], as a tuple whose first part is what counts.
torch::jit::Module scaling(double scale) {
  torch::jit::Module module("Scaling");
  module.register_attribute("scale", c10::FloatType::get(), scale);
  module.define("def forward(self, x: Tensor):\n    return x * self.scale, torch.zeros_like(x)\n");
  return module;
}

// ‖(1 + e) x - x‖ / ‖x‖ = e; doubles of a power of two and of 1 + 1/4 are exact.
TEST(OutputErrors, AreRelativeToTheReferenceOverAllInputs) {
  const std::vector<at::Tensor> inputs{at::ones({2, 3}), at::full({5}, -8.0)};
  int64_t seen = 0;
  const std::vector<double> errors =
      output_errors(scaling(2), {scaling(2.5), scaling(2), scaling(-2)}, inputs, [&](int64_t done, int64_t total) {
        EXPECT_EQ(total, 2);
        seen = done;
      });
  ASSERT_EQ(errors.size(), 3u);
  EXPECT_DOUBLE_EQ(errors[0], 0.25);
  EXPECT_EQ(errors[1], 0.0);
  EXPECT_DOUBLE_EQ(errors[2], 2.0);
  EXPECT_EQ(seen, 2);
}

TEST(OutputErrors, RefuseWhatHasNoError) {
  EXPECT_THROW(output_errors(scaling(0), {scaling(1)}, {at::ones({2})}), c10::Error);
  EXPECT_THROW(output_errors(scaling(1), {scaling(std::numeric_limits<double>::infinity())}, {at::ones({2})}),
               c10::Error);
  torch::jit::Module shorter("Shorter");
  shorter.define("def forward(self, x: Tensor):\n    return x[1:]\n");
  EXPECT_THROW(output_errors(scaling(1), {shorter}, {at::ones({2})}), c10::Error);
  EXPECT_THROW(output_errors(scaling(1), {scaling(1)}, {}), c10::Error);
  torch::jit::Module counting("Counting");
  counting.define("def forward(self, x: Tensor):\n    return x.gt(0.0)\n");
  EXPECT_THROW(output_errors(counting, {counting}, {at::ones({2})}), c10::Error);
}

}  // namespace
}  // namespace gptq
