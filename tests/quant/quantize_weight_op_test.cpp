#include <ATen/core/dispatch/Dispatcher.h>
#include <gptq/quantize_weight.h>
#include <gtest/gtest.h>
#include <torch/script.h>

#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

TEST(QuantizeWeightOp, ReturnsWhatTheFunctionReturns) {
  const test::RandomLayer layer = test::random_layer(10, 40, 81);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gptq::quantize_weight", "");
  torch::jit::Stack stack{layer.weight, layer.hessian, 3, 16, false};
  stack.insert(stack.end(), {c10::IValue(false), c10::IValue("off"), c10::IValue("default"), c10::IValue(0.05),
                             c10::IValue(32), c10::IValue(0.1 * layer.hessian), c10::IValue(0.5)});
  op.callBoxed(&stack);
  QuantizeOptions options{3, 16, false, false, "off", "default", 0.05, 32, 0.5};
  const QuantizeResult expected = quantize_weight(layer.weight, layer.hessian, options, 0.1 * layer.hessian);
  ASSERT_EQ(stack.size(), 4);
  EXPECT_TRUE(stack[0].toTensor().equal(expected.codes));
  EXPECT_TRUE(stack[1].toTensor().equal(expected.scales));
  EXPECT_TRUE(stack[2].toTensor().equal(expected.zeros));
  const auto report = stack[3].toGenericDict();
  EXPECT_EQ(report.at("loss").toDouble(), expected.report.loss);
  EXPECT_EQ(report.at("damping").toDouble(), 0.05);
  EXPECT_EQ(report.size(), 8);
}

}  // namespace
}  // namespace gptq
