// The CUDA kernels of linear_w4 and linear_w8, run on the host, give the bits of the CPU operator.
#include "tests/cuda_on_host.h"
// After what runs it.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/dequantize_w4.cu"
#include "cuda/linear_w4_cuda.cu"
#include "cuda/linear_w4_gemm.cu"
#include "cuda/linear_w4_gemv.cu"
#include "cuda/linear_w4_split.cu"
#include "gptq/linear_w4.h"
#include "linear_w4_check.h"
#include "tests/reference_w4.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

using reference::random_w4_weight;
using reference::W4Weight;

at::Tensor linear_on_host(const at::Tensor& x, const W4Weight& weight, const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& order, const char* compute) {
  LinearW4Arguments arguments = prepare_linear_w4(weight.bits, x, weight.packed, weight.scales, weight.zeros, bias,
                                                  order, weight.group_size, compute);
  LinearW4CudaProblem p = {};
  static_cast<LinearW4Operands&>(p) = arguments.operands;
  p.group_size = std::max<int64_t>(1, weight.group_size == -1 ? p.k : std::min(weight.group_size, p.k));
  // Everything of its exact size; the weight is aligned as the launcher asks, the rest to its elements.
  const auto bytes_at = [](auto& memory, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(memory.data(), from, bytes);
  };
  cuda_on_host::Memory<uint8_t> packed(arguments.packed.numel(), 16);
  bytes_at(packed, p.packed, arguments.packed.numel());
  p.packed = packed.data();
  cuda_on_host::Memory<uint16_t> scales(arguments.scales.numel(), 2);
  bytes_at(scales, p.scales, 2 * arguments.scales.numel());
  p.scales = scales.data();
  const int64_t x_bytes = p.m * p.k == 0 ? 0 : ((p.m - 1) * p.x_stride + p.k) * x.element_size();
  cuda_on_host::Memory<char> input(x_bytes, x.element_size());
  bytes_at(input, p.x, x_bytes);
  p.x = input.data();
  cuda_on_host::Memory<char> output(p.m * p.n * x.element_size(), x.element_size());
  p.y = output.data();

  LinearW4CudaPlan plan = {};
  EXPECT_EQ(plan_linear_w4_cuda(p, plan), cudaSuccess);
  cuda_on_host::Memory<char> scratch(plan.scratch_bytes, 16);
  EXPECT_EQ(linear_w4_cuda(p, plan, scratch.data(), nullptr), cudaSuccess);
  cuda_on_host::synchronize();
  EXPECT_TRUE(output.intact() && scratch.intact());
  std::memcpy(arguments.y.mutable_data_ptr(), output.data(), arguments.y.nbytes());
  return arguments.y;
}

void expect_same(const at::Tensor& x, const W4Weight& weight, const char* compute,
                 const std::optional<at::Tensor>& bias = {}, const std::optional<at::Tensor>& order = {}) {
  const auto linear = weight.bits == 8 ? linear_w8 : linear_w4;
  const at::Tensor expected =
      linear(x, weight.packed, weight.scales, weight.zeros, bias, order, weight.group_size, compute);
  const at::Tensor found = linear_on_host(x, weight, bias, order, compute);
  ASSERT_EQ(found.scalar_type(), expected.scalar_type());
  const auto bits = [](const at::Tensor& y) { return y.to(at::kFloat).nan_to_num(7e30).view(at::kInt); };
  EXPECT_TRUE(at::equal(bits(found), bits(expected)))
      << "x " << x.sizes() << " " << x.scalar_type() << ", N " << weight.scales.size(1) << ", group "
      << weight.group_size << ", " << weight.bits << " bits, " << compute << ", zeros " << weight.zeros.has_value()
      << ", bias " << bias.has_value() << ", order " << order.has_value() << ", multiprocessors "
      << cuda_on_host::device.multiprocessors;
}

// Outliers, halves, tiny and huge rows, zeros, a NaN and an infinity.
at::Tensor varied_input(int64_t m, int64_t k) {
  at::Tensor x = at::randn({m, k});
  x.slice(1, 3, k, 50) *= 1000;
  if (m > 1) x[1] = (x[1] * 8).round() / 8;
  if (m > 2) x[2] *= 1e-41;
  if (m > 3) x[3] = x[3].nan_to_num() * 1e34;
  if (m > 4) x[4][k / 2] = NAN;
  if (m > 5) x[5].slice(0, 0, k / 2).zero_();
  if (m > 6) x[6][0] = -INFINITY;
  return x;
}

class LinearW4Cuda : public testing::Test {
 protected:
  void SetUp() override { at::manual_seed(60); }
  void TearDown() override { cuda_on_host::device = kDevice; }
  const DeviceLimits kDevice = cuda_on_host::device;
};

constexpr const char* kComputes[] = {"int8", "bf16", "exact"};

TEST_F(LinearW4Cuda, EveryShapeAndOption) {
  int round = 0;
  for (const auto& shape : shapes::kAwkward)
    for (const char* compute : kComputes) {
      // Every option with every other one over the shapes.
      const int bits = round % 2 == 0 ? 4 : 8;
      const auto weight = random_w4_weight(shape.n, shape.k, shape.group_size, round % 4 < 2, 61, bits);
      std::optional<at::Tensor> bias, order;
      if (round % 3 != 0) bias = at::randn({shape.n});
      if (round % 5 == 0) order = at::randperm(shape.k, at::kInt);
      constexpr at::ScalarType kTypes[] = {at::kFloat, at::kFloat, at::kBFloat16, at::kHalf};
      cuda_on_host::device.multiprocessors = round % 7 == 0 ? 40 : 1;
      const at::Tensor x = varied_input(shape.m, shape.k).to(kTypes[round % 4]);
      expect_same(x, weight, compute, bias, order);
      ++round;
    }
}

TEST_F(LinearW4Cuda, EveryNumberOfTokensAroundATile) {
  for (const int bits : {4, 8}) {
    const auto weight = random_w4_weight(50, 200, 43, bits == 4, 62, bits);
    for (const int64_t rows : {1, 2, 4, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 127, 128, 129})
      expect_same(varied_input(rows, 200), weight, kComputes[rows % 3]);
  }
}

TEST_F(LinearW4Cuda, SpansAreDealtOut) {
  // Over warps, over thread blocks, and where a thread block has less shared memory than some kernels want.
  int round = 0;
  for (const int64_t k : {2 * kSpan, int64_t{3100}, int64_t{9300}})
    for (const int64_t rows : {1, 2, 3, 8, 9, 20, 40, 70}) {
      if (k > 4096 && rows > 9) continue;
      const int bits = round % 3 == 2 ? 8 : 4;
      const auto weight = random_w4_weight(40, k, round % 2 == 0 ? 128 : 100, round % 4 == 1, 66, bits);
      cuda_on_host::device.multiprocessors = round % 5 < 2 ? 40 : 1;
      cuda_on_host::device.shared_bytes = (round % 2 == 0 ? 99 : 227) * 1024;
      expect_same(varied_input(rows, k), weight, kComputes[round++ % 3]);
    }
}

TEST_F(LinearW4Cuda, InputsWithStrides) {
  const auto weight = random_w4_weight(65, 203, 50, true, 63);
  expect_same(at::randn({12, 220}).slice(0, 0, 12, 2).slice(1, 5, 208), weight, "exact");
  expect_same(at::randn({203}).expand({3, 203}), weight, "exact");
}

TEST_F(LinearW4Cuda, LargestSums) {
  for (const int bits : {4, 8})
    for (const bool largest : {false, true}) {
      auto weight = random_w4_weight(33, 260, 128, true, 64, bits);
      const int most = (1 << bits) - 1;
      weight.packed = bits == 8 ? pack_w8(at::full({33, 260}, largest ? most : 0, at::kByte))
                                : pack_w4(at::full({33, 260}, largest ? most : 0, at::kByte));
      weight.zeros = at::full({3, 33}, largest ? 0 : most, at::kByte);
      for (const double value : {-1.0, 1.0})
        for (const char* compute : kComputes) {
          expect_same(at::full({5, 260}, value), weight, compute);
          expect_same(at::full({20, 260}, value), weight, compute);
        }
    }
}

TEST_F(LinearW4Cuda, NoColumns) {
  const auto weight = random_w4_weight(20, 0, 32, false, 69);
  for (const int64_t rows : {3, 20}) expect_same(at::empty({rows, 0}), weight, "exact", at::randn({20}));
}

TEST_F(LinearW4Cuda, AnOrderOutsideOfTheInputGivesNan) {
  const auto weight = random_w4_weight(20, 64, 32, true, 65);
  at::Tensor order = at::arange(64, at::kInt);
  order[40] = 64;
  EXPECT_TRUE(linear_on_host(at::randn({3, 64}), weight, {}, order, "exact").isnan().all().item<bool>());
}

TEST_F(LinearW4Cuda, DequantizesTo16Bits) {
  for (const int bits : {4, 8})
    for (const auto& [n, k, group_size] : {std::tuple{40, 203, 50}, {33, 264, 128}, {17, 1, -1}, {65, 31, 3}})
      for (const auto type : {at::kBFloat16, at::kHalf}) {
        const auto weight = random_w4_weight(n, k, group_size, bits == 4, 67, bits);
        const at::Tensor x = at::randn({1, k}).to(type);
        const auto arguments =
            prepare_linear_w4(bits, x, weight.packed, weight.scales, weight.zeros, {}, {}, group_size, "bf16");
        LinearW4CudaProblem p = {};
        static_cast<LinearW4Operands&>(p) = arguments.operands;
        p.group_size = group_size == -1 ? k : group_size;
        const int64_t pitch = (k + 7) / 8 * 8, half = n / 2 / 16 * 16;
        const at::Tensor found = at::empty({n, pitch}, type);
        for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, half}, {half, n}}) {
          cuda_on_host::Memory<char> part((end - begin) * pitch * 2);
          EXPECT_EQ(dequantize_w4_cuda(p, begin, end, part.data(), nullptr), cudaSuccess);
          cuda_on_host::synchronize();
          EXPECT_TRUE(part.intact());
          std::memcpy(found[begin].mutable_data_ptr(), part.data(), (end - begin) * pitch * 2);
        }
        const at::Tensor expected = reference::dequantize_w4(weight).to(type);
        EXPECT_TRUE(at::equal(found.narrow(1, 0, k), expected)) << bits << " bits, N " << n << ", K " << k;
        EXPECT_FALSE(found.narrow(1, k, pitch - k).any().item<bool>());
      }
}

TEST_F(LinearW4Cuda, GathersItsInput) {
  const auto weight = random_w4_weight(20, 64, 32, true, 68);
  const at::Tensor x = at::randn({5, 70}).to(at::kHalf).narrow(1, 3, 64);
  at::Tensor order = at::randperm(64, at::kInt);
  at::Tensor expected = x.index_select(1, order);
  order[40] = -1;
  expected.select(1, 40).fill_(NAN);
  const auto arguments = prepare_linear_w4(4, x, weight.packed, weight.scales, weight.zeros, {}, order, 32, "bf16");
  LinearW4CudaProblem p = {};
  static_cast<LinearW4Operands&>(p) = arguments.operands;
  at::Tensor found = at::empty({5, 64}, at::kHalf);
  EXPECT_EQ(gather_input_cuda(p, found.mutable_data_ptr(), nullptr), cudaSuccess);
  cuda_on_host::synchronize();
  EXPECT_TRUE(at::allclose(found, expected, 0, 0, true));
}

// What runs the kernels sees their mistakes.
__global__ void misses_a_barrier() {
  if (threadIdx.x != 3) __syncthreads();
}
__global__ void misses_a_lane(int* y) {
  if (threadIdx.x != 5) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void reads_shared_memory(int* y, bool waits) {
  __shared__ int shared[4];
  char* dynamic = shared_memory();
  if (threadIdx.x == 0) copy_async(dynamic, y);
  end_copy_batch();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (waits) wait_for_copies<0>();
  if (waits) __syncthreads();
  const int other = shared[3 - threadIdx.x] + reinterpret_cast<int*>(dynamic)[3 - threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = other;
}
__global__ void writes_one(int* y) {
  y[threadIdx.x] = 1;
}
__global__ void doubles(int* y, bool waits) {
  if (waits) wait_for_kernel_ahead();
  y[threadIdx.x] = y[threadIdx.x] == 1 ? 2 : 1;
}

TEST(CudaOnHost, SeesMistakes) {
  cuda_on_host::Memory<int> y(32, 16);
  launch(misses_a_barrier, {1, 32}, nullptr);
  EXPECT_THROW(cuda_on_host::synchronize(), std::runtime_error);
  launch(misses_a_lane, {1, 32}, nullptr, y.data());
  EXPECT_THROW(cuda_on_host::synchronize(), std::runtime_error);
  for (const bool waits : {true, false}) {
    for (int i = 0; i < 4; ++i) y.data()[i] = 10 * i;
    launch(reads_shared_memory, {1, 4, 16}, nullptr, y.data(), waits);
    cuda_on_host::synchronize();
    const std::vector<int> found(y.data(), y.data() + 4), expected = {33, 22, 11, 0};
    EXPECT_EQ(found == expected, waits);
    launch(writes_one, {1, 32}, nullptr, y.data());
    launch(doubles, LaunchShape{1, 32, 0, true}, nullptr, y.data(), waits);
    cuda_on_host::synchronize();
    EXPECT_EQ(y.data()[7], waits ? 2 : 1);
  }
#ifndef __SANITIZE_ADDRESS__
  launch(writes_one, {1, 32}, nullptr, y.data() + 1);
  cuda_on_host::synchronize();
  EXPECT_FALSE(y.intact());
#endif
}

}  // namespace
}  // namespace gptq
