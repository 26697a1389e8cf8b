// The solver of CUDA devices with its kernels run on the host: the codes of the CPU in float64, its loss in float32.
#define launch_kernel launch_kernel_on_host  // the library has this name too
#include "tests/cuda_on_host.h"
// After what runs them.
#include <ATen/ATen.h>
#include <gptq/gptq_layer.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "quant/cuda/refine_cuda.cu"
#include "quant/cuda/scale_search_cuda.cu"
#include "quant/cuda/sweep_cuda.cu"
#include "quant/device_kernels.h"
#include "quant/factor.h"
#include "tests/quant/error_of.h"
#include "tests/quant/random_layer.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

using test::random_layer;
using test::RandomLayer;

template <typename Block>
void run_on_host(const Block& block) {
  ASSERT_EQ(launch_kernel(block, nullptr), cudaSuccess);
  cuda_on_host::synchronize();
}

template <typename T>
constexpr DeviceKernels<T> kOnHost = {run_on_host<SweptBlock<T>>, run_on_host<SolvedBlock<T>>,
                                      run_on_host<MovedBlock<T>>, run_on_host<FittedGroup<T>>,
                                      run_on_host<SearchedGroups<T>>};

/// While it lives, the CPU is a device.
struct CpuIsDevice {
  CpuIsDevice() { set_device_kernels(at::kCPU, &kOnHost<float>, &kOnHost<double>); }
  ~CpuIsDevice() { set_device_kernels(at::kCPU, nullptr, nullptr); }
  CpuIsDevice(const CpuIsDevice&) = delete;
  CpuIsDevice& operator=(const CpuIsDevice&) = delete;
};

template <typename Call>
auto on_device(const Call& call) {
  const CpuIsDevice device;
  return call();
}

struct Variant {
  const char* name;
  std::function<void(QuantizeOptions&)> set;
};

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

void expect_same_report(const QuantizeReport& found, const QuantizeReport& expected, double tolerance) {
  expect_near(found.loss, expected.loss, tolerance, "loss");
  expect_near(found.sweep_loss, expected.sweep_loss, tolerance, "sweep_loss");
  expect_near(found.rtn_loss, expected.rtn_loss, tolerance, "rtn_loss");
  expect_near(found.relative_error, expected.relative_error, tolerance, "relative_error");
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
  expect_same_report(found.report, expected.report, kFloat64Tolerance);
  EXPECT_EQ(found.report.guarded_rows, expected.report.guarded_rows);
}

class QuantizeWeightCuda : public testing::TestWithParam<Variant> {};

TEST_P(QuantizeWeightCuda, GivesTheCodesOfTheCpuInFloat64) {
  for (const auto& [m, k, n, group_size] : shapes::kAwkward) {
    SCOPED_TRACE(testing::Message() << "[" << n << ", " << k << "], groups of " << group_size);
    if (k > 600) {
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

INSTANTIATE_TEST_SUITE_P(Variants, QuantizeWeightCuda, testing::ValuesIn(kVariants));

}  // namespace
}  // namespace gptq
