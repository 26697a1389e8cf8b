#include "quant/pull_kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/cpu_features.h"
#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

template <typename T>
class PullKernel : public ::testing::Test {};
using Floats = ::testing::Types<float, double>;
TYPED_TEST_SUITE(PullKernel, Floats);

// One fused product and sum at a time; a processor without them rounds the product too.
TYPED_TEST(PullKernel, EqualsFusedSumsInOrder) {
  using T = TypeParam;
  constexpr int64_t rows = kStripRows<T>, stride = 310;
  constexpr auto dtype = std::is_same_v<T, float> ? at::kFloat : at::kDouble;
  const at::Tensor matrix = test::random_layer(20, stride, 1).weight.to(dtype);
  const at::Tensor columns = test::random_layer(stride, rows, 2).weight.to(dtype);
  const auto* m = matrix.const_data_ptr<T>();
  const auto* x = columns.const_data_ptr<T>();
  for (const auto& [from, to] : {std::pair{0, 0}, {0, 1}, {3, 95}, {0, 96}, {5, 102}, {0, 310}}) {
    for (const int64_t count : {1, 2, 5, 6, 7, 13, 20}) {  // around tiles of 2 and 6 columns
      at::Tensor targets = test::random_layer(count, rows, 3).weight.to(dtype), expected = targets.clone();
      auto* e = expected.data_ptr<T>();
      double size = 0;
      for (int64_t c = 0; c < count; ++c) {
        for (int64_t r = 0; r < rows; ++r) {
          double absolute = std::abs(e[c * rows + r]);
          for (int64_t j = from; j < to; ++j) {
            e[c * rows + r] = std::fma(x[j * rows + r], m[c * stride + j], e[c * rows + r]);
            absolute += std::abs(x[j * rows + r] * m[c * stride + j]);
          }
          size = std::max(size, absolute);
        }
      }
      pull(m, stride, x, from, to, count, targets.data_ptr<T>());
      const bool fused = (cpu_features() & kCpuFma) != 0;
      const double tolerance = fused ? 0 : 311 * std::numeric_limits<T>::epsilon() * size;
      EXPECT_LE(targets.sub(expected).abs().max().item().toDouble(), tolerance) << from << " " << to << " " << count;
    }
  }
}

}  // namespace
}  // namespace gptq
