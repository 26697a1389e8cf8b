// The solver of CUDA devices with its kernels run on the host: the codes of the CPU in float64, its loss in float32.
#include "tests/quant/kernels_on_host.h"
// After what runs them.
#include <ATen/ATen.h>
#include <gptq/gptq_layer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "quant/cuda/refine_cuda.cu"
#include "quant/cuda/scale_search_cuda.cu"
#include "quant/cuda/sweep_cuda.cu"
#include "quant/factor.h"
#include "tests/error_of.h"
#include "tests/quant/random_layer.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

using test::random_layer;
using test::RandomLayer;

/// The call with the CPU for a device.
template <typename Call>
auto on_device(const Call& call) {
  const test::KernelsOnHost kernels(at::kCPU);
  return call();
}

struct Variant {
  const char* name;
  std::function<void(QuantizeOptions&)> set;
};

void PrintTo(const Variant& variant, std::ostream* out) {
  *out << variant.name;
}

const Variant kVariants[] = {
    {"default", [](auto&) {}},
    {"asymmetric", [](auto& o) { o.symmetric = false; }},
    {"2 bits", [](auto& o) { o.bits = 2; }},
    {"3 bits, asymmetric, as stored", [](auto& o) { o.bits = 3, o.symmetric = false, o.act_order = "off"; }},
    {"8 bits, by min/max", [](auto& o) { o.bits = 8, o.scale_search = "minmax"; }},
    {"dynamic order", [](auto& o) { o.act_order = "dynamic"; }},
    {"three sweeps, no guard", [](auto& o) { o.refine_sweeps = 3, o.row_guard = false; }},
    {"no refinement, blocks of 7", [](auto& o) { o.refine_sweeps = 0, o.block_size = 7; }},
    {"one block", [](auto& o) { o.block_size = 5000; }},
    {"one scale", [](auto& o) { o.per_tensor = true; }},
    {"no comparison", [](auto& o) { o.compare = false; }},
    {"classic", [](auto& o) { o.mode = "classic"; }},
    {"classic, asymmetric, blocks of 20", [](auto& o) { o.mode = "classic", o.symmetric = false, o.block_size = 20; }},
    {"classic, static order", [](auto& o) { o.mode = "classic", o.act_order = "static"; }},
    {"classic, dynamic order", [](auto& o) { o.mode = "classic", o.act_order = "dynamic", o.bits = 3; }},
    {"rtn", [](auto& o) { o.mode = "rtn", o.symmetric = false; }},
    {"rtn, weighted", [](auto& o) { o.mode = "rtn", o.scale_search = "weighted"; }},
};

void expect_same_tensor(const at::Tensor& found, const at::Tensor& expected) {
  ASSERT_EQ(found.defined(), expected.defined());
  if (expected.defined()) {
    EXPECT_EQ(found.scalar_type(), expected.scalar_type());
    EXPECT_TRUE(found.is_contiguous());
    EXPECT_TRUE(at::equal(found, expected)) << found.ne(expected).sum().item<int64_t>() << " differ";
  }
}

// Relative; a NaN is only near a NaN.
void expect_near(double found, double expected, double tolerance, const char* name) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(found)) << name;
  } else {
    EXPECT_NEAR(found, expected, tolerance * std::abs(expected) + 1e-12) << name;
  }
}

// tolerance is that of everything before refinement.
void expect_same_report(const QuantizeReport& found, const QuantizeReport& expected, double tolerance,
                        double refined_tolerance) {
  expect_near(found.loss, expected.loss, refined_tolerance, "loss");
  expect_near(found.sweep_loss, expected.sweep_loss, tolerance, "sweep_loss");
  expect_near(found.rtn_loss, expected.rtn_loss, tolerance, "rtn_loss");
  expect_near(found.relative_error, expected.relative_error, refined_tolerance, "relative_error");
  expect_near(found.rtn_relative_error, expected.rtn_relative_error, tolerance, "rtn_relative_error");
  EXPECT_EQ(found.refined, expected.refined);
  EXPECT_EQ(found.damping, expected.damping);
  EXPECT_EQ(found.damping_escalations, expected.damping_escalations);
  EXPECT_EQ(found.float64, expected.float64);
  EXPECT_EQ(found.dead_columns, expected.dead_columns);
  EXPECT_EQ(found.too_few_samples, expected.too_few_samples);
}

// Sums of at most a few thousand terms in another order, which are conditioned better than 1e4.
constexpr double kFloat64Tolerance = 1e-9;

void expect_same_result(const QuantizeResult& found, const QuantizeResult& expected) {
  expect_same_tensor(found.codes, expected.codes);
  expect_same_tensor(found.scales, expected.scales);
  expect_same_tensor(found.zeros, expected.zeros);
  expect_same_tensor(found.input_order, expected.input_order);
  ASSERT_EQ(found.bias_shift.defined(), expected.bias_shift.defined());
  if (expected.bias_shift.defined()) {
    EXPECT_TRUE(found.bias_shift.allclose(expected.bias_shift, 1e-6, 1e-6));
  }
  EXPECT_EQ(found.group_size, expected.group_size);
  expect_same_report(found.report, expected.report, kFloat64Tolerance, kFloat64Tolerance);
  EXPECT_EQ(found.report.guarded_rows, expected.report.guarded_rows);
}

class QuantizeWeightCuda : public testing::TestWithParam<Variant> {};

// Rows around a thread block of 128 and tiles of 16 columns are among them.
TEST_P(QuantizeWeightCuda, GivesTheCodesOfTheCpuInFloat64) {
  for (const auto& [m, k, n, group_size] : shapes::kAwkward) {
    SCOPED_TRACE(testing::Message() << "[" << n << ", " << k << "], groups of " << group_size);
    if (k > 300) {
      continue;
    }
    const RandomLayer layer = random_layer(n, k, 31 * k + n);
    QuantizeOptions options;
    options.group_size = group_size;
    GetParam().set(options);
    const auto quantize = [&] { return quantize_weight(layer.weight, layer.hessian, options); };
    const QuantizeResult expected = quantize();
    const int64_t before = cuda_on_host::kernels_run();
    const QuantizeResult found = on_device(quantize);
    EXPECT_EQ(cuda_on_host::kernels_run() > before, options.mode != "rtn" || options.scale_search == "weighted");
    expect_same_result(found, expected);
    EXPECT_TRUE(at::equal(on_device([&] { return found.dequantize(); }), expected.dequantize()));
  }
}

TEST_P(QuantizeWeightCuda, GivesTheLossOfTheCpuInFloat32) {
  const RandomLayer layer = random_layer(500, 200, 7);
  QuantizeOptions options;
  options.group_size = 48;
  GetParam().set(options);
  const at::Tensor weight = layer.weight.to(at::kFloat), hessian = layer.hessian.to(at::kFloat);
  const auto quantize = [&] { return quantize_weight(weight, hessian, options); };
  const QuantizeResult expected = quantize(), found = on_device(quantize);
  // Targets that rounding takes across a tie make it; with 8 bits, whose steps are a 16th, that many more of them.
  const double tolerance = options.bits == 8 ? 5e-4 : 1e-4;
  // The CPU refines with gradients of bfloat16, whose rounding takes other codes across a tie.
  expect_same_report(found.report, expected.report, tolerance, expected.report.refined ? 3e-3 : tolerance);
  const double different = found.codes.ne(expected.codes).to(at::kDouble).mean().item<double>();
  EXPECT_LT(different, expected.report.refined ? 5e-2 : 1e-2);
}

INSTANTIATE_TEST_SUITE_P(Variants, QuantizeWeightCuda, testing::ValuesIn(kVariants));

// More columns than one panel, groups longer than a kernel's block, and every step of it.
TEST(QuantizeWeightCudaWide, GivesTheCodesOfTheCpuInFloat64) {
  const RandomLayer layer = random_layer(37, 700, 5, 1500);
  for (const int64_t group_size : {-1, 300}) {
    for (const char* mode : {"default", "classic"}) {
      QuantizeOptions options;
      options.group_size = group_size;
      options.mode = mode;
      const auto quantize = [&] { return quantize_weight(layer.weight, layer.hessian, options); };
      const QuantizeResult expected = quantize();
      expect_same_result(on_device(quantize), expected);
    }
  }
}

// What a layer with a bias gathers behind other quantized layers.
LayerStatistics all_statistics(const RandomLayer& layer, bool device) {
  const auto gather = [&] {
    const int64_t n = layer.weight.size(0);
    GPTQLayer gatherer(layer.weight.to(at::kFloat), at::zeros({n}));
    const at::Tensor inputs = layer.inputs.to(at::kFloat) + 0.5;
    for (const at::Tensor& batch : inputs.split(100)) {
      gatherer.add_batch(batch, batch + 0.1 * batch.roll(1, 1));
    }
    return gatherer.statistics();
  };
  return device ? on_device(gather) : gather();
}

TEST(QuantizeWeightCudaStatistics, GiveTheCodesOfTheCpuInFloat64) {
  const RandomLayer layer = random_layer(70, 90, 11);
  const LayerStatistics statistics = all_statistics(layer, false);
  for (const double alpha : {0.0, 0.5, 1.0}) {
    for (const bool search : {false, true}) {
      QuantizeOptions options;
      options.bits = 3;
      options.group_size = 32;
      options.target_alpha = alpha;
      options.correct_bias = search;
      options.search_damping = search;
      const auto quantize = [&] { return quantize_weight(layer.weight, statistics, options); };
      const QuantizeResult expected = quantize(), found = on_device(quantize);
      EXPECT_EQ(found.bias_shift.defined(), search);
      expect_same_result(found, expected);
    }
  }
}

TEST(QuantizeWeightCudaStatistics, AreThoseOfTheCpu) {
  const RandomLayer layer = random_layer(20, 600, 12, 700);
  const LayerStatistics expected = all_statistics(layer, false), found = all_statistics(layer, true);
  for (const auto member :
       {&LayerStatistics::hessian, &LayerStatistics::drift, &LayerStatistics::mean, &LayerStatistics::float_mean,
        &LayerStatistics::half_hessian, &LayerStatistics::half_drift}) {
    EXPECT_TRUE((found.*member).allclose(expected.*member, 1e-5, 1e-5));
  }
}

// Fewer inputs than columns, an input that is always 0, and one 1000 times as large as the others.
TEST(QuantizeWeightCudaFactor, IsRescuedAsOnTheCpu) {
  RandomLayer layer = random_layer(20, 60, 13, 30);
  layer.inputs.select(1, 5).zero_();
  layer.inputs.select(1, 7).mul_(1000);
  layer.hessian = layer.inputs.t().mm(layer.inputs) / 15;
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    for (const double damping : {0.0, 1e-9, 0.01}) {
      QuantizeOptions options;
      options.damping = damping;
      const auto quantize = [&] { return quantize_weight(layer.weight.to(dtype), layer.hessian.to(dtype), options); };
      const QuantizeResult expected = quantize(), found = on_device(quantize);
      EXPECT_EQ(expected.report.dead_columns, 1);
      EXPECT_EQ(expected.report.damping_escalations, damping == 0 ? 1 : 0);
      // In float32 a few codes at ties may fall the other way.
      const double tolerance = dtype == at::kDouble ? 1e-6 : 0.05;
      expect_same_report(found.report, expected.report, tolerance, tolerance);
    }
  }
}

TEST(QuantizeWeightCudaErrors, AreThoseOfTheCpu) {
  const RandomLayer layer = random_layer(5, 40, 14);
  const auto both = [&](const at::Tensor& weight, const at::Tensor& hessian, const QuantizeOptions& options) {
    const auto quantize = [&] { quantize_weight(weight, hessian, options); };
    const std::string expected = test::error_of(quantize);
    EXPECT_EQ(on_device([&] { return test::error_of(quantize); }), expected);
    return expected;
  };
  QuantizeOptions options;
  at::Tensor indefinite = layer.hessian.clone();
  indefinite[0][1] = indefinite[1][0] = 100;
  EXPECT_NE(both(layer.weight, indefinite, options).find("no usable Cholesky factor"), std::string::npos);
  at::Tensor skew = layer.hessian.clone();
  skew[0][39] += 1;
  EXPECT_NE(both(layer.weight, skew, options).find("must be symmetric"), std::string::npos);
  at::Tensor nan = layer.weight.clone();
  nan[4][39] = std::nan("");
  EXPECT_NE(both(nan, layer.hessian, options).find("got 1 NaN or Inf"), std::string::npos);
  at::Tensor large = layer.weight.clone();
  large[3][38] = 1e6;
  EXPECT_NE(both(large, layer.hessian, options).find("scales are float16"), std::string::npos);
  options.mode = "classic";
  options.group_size = 16;
  EXPECT_NE(both(large, layer.hessian, options).find("scales are float16"), std::string::npos);
}

}  // namespace
}  // namespace gptq
