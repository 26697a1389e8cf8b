#include <gptq/linear_w4.h>
#include <gptq/quantize_module.h>
#include <gtest/gtest.h>
#include <torch/script.h>

#include <sstream>

#include "rewrite/linear_finder.h"
#include "tests/rewrite/modules.h"

namespace gptq::rewrite {
namespace {

using test::compose;
using test::linear;
using test::random_tensor;

constexpr int64_t kGroupSize = 8;

torch::jit::Module float_chain() {
  return compose({{"first", linear(24, 16, 1)}, {"second", linear(8, 24, 3)}}, R"(
def forward(self, x: Tensor) -> Tensor:
    h = self.first.forward(x)
    if h.size(0) > 1:
        h = self.second.forward(h)
    return h
)");
}

torch::jit::Module quantized_chain() {
  QuantizeModuleOptions options;
  options.quantize.mode = "rtn";
  options.quantize.group_size = kGroupSize;
  return quantize_module(float_chain(), {}, options).module;
}

at::Tensor run(torch::jit::Module module, const at::Tensor& x) {
  return module.forward({x}).toTensor();
}

at::Tensor expected(const torch::jit::Module& module, const at::Tensor& x, const char* compute) {
  at::Tensor y = x;
  for (const char* layer : {"first", "second"}) {
    const auto held = [&](const char* name) { return attribute_at(module, std::string(layer) + name).toTensor(); };
    y = linear_w4(y, held(".packed"), held(".scales"), {}, held(".bias"), {}, kGroupSize, compute);
  }
  return y;
}

TEST(LinearCompute, EveryLinearTakesTheMode) {
  const at::Tensor x = random_tensor({5, 16}, 7);
  for (const char* compute : {"int8", "bf16", "exact"}) {
    const torch::jit::Module module = quantized_chain();
    EXPECT_EQ(set_linear_compute(module, compute), 2);
    EXPECT_TRUE(at::equal(run(module, x), expected(module, x, compute))) << compute;
  }
  const torch::jit::Module module = quantized_chain();
  EXPECT_FALSE(at::equal(expected(module, x, "int8"), expected(module, x, "exact")));
  EXPECT_TRUE(at::equal(run(module, x), expected(module, x, "exact")));
}

TEST(LinearCompute, AFileThatWasLoadedTakesTheMode) {
  std::stringstream file;
  quantized_chain().save(file);
  const torch::jit::Module module = torch::jit::load(file);
  EXPECT_EQ(set_linear_compute(module, "int8"), 2);
  const at::Tensor x = random_tensor({5, 16}, 8);
  EXPECT_TRUE(at::equal(run(module, x), expected(module, x, "int8")));
}

TEST(LinearCompute, AnotherModeIsRefused) {
  EXPECT_THROW(set_linear_compute(quantized_chain(), "int4"), c10::Error);
}

TEST(LinearCompute, AFloatModuleHasNoLinearToSet) {
  EXPECT_EQ(set_linear_compute(float_chain(), "int8"), 0);
}

}  // namespace
}  // namespace gptq::rewrite
