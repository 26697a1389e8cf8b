#include "quant/pull_kernel.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

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

at::Tensor pairs_of(const at::Tensor& first, const at::Tensor& second) {
  at::Tensor pairs = at::empty_like(first, at::kUInt32);
  round_to_pairs(first.const_data_ptr<float>(), second.const_data_ptr<float>(), first.numel(), 1,
                 pairs.mutable_data_ptr<Bf16Pair>());
  return pairs;
}

TEST(PullPairs, RoundsToNearestEven) {
  const std::vector<float> values = {0, -0.0F, 1, 0x1.01p0F, 0x1.03p0F, 0x1.010002p0F, -0x1.fffp9F, 3e38F};
  const at::Tensor first = at::tensor(values), second = first.flip(0);
  const at::Tensor pairs = pairs_of(first, second);
  const auto halves = [](const at::Tensor& of) { return of.to(at::kBFloat16).view(at::kUInt16).to(at::kLong); };
  EXPECT_TRUE(pairs.to(at::kLong).equal(halves(first) * 65536 + halves(second)));
}

TEST(PullPairs, EqualsPullOfTheRoundedValues) {
  constexpr int64_t rows = kStripRows<float>, stride = 155;
  const at::Tensor matrix = test::random_layer(20, 2 * stride, 1).weight.to(at::kFloat);
  const at::Tensor columns = test::random_layer(2 * stride, rows, 2).weight.to(at::kFloat);
  const auto every_other = [](const at::Tensor& of, int64_t dim, int64_t first) {
    return of.slice(dim, first, std::nullopt, 2).contiguous();
  };
  const at::Tensor matrix_pairs = pairs_of(every_other(matrix, 1, 0), every_other(matrix, 1, 1));
  const at::Tensor column_pairs = pairs_of(every_other(columns, 0, 0), every_other(columns, 0, 1));
  const at::Tensor rounded_matrix = matrix.to(at::kBFloat16).to(at::kFloat);
  const at::Tensor rounded_columns = columns.to(at::kBFloat16).to(at::kFloat);
  for (const auto& [from, to] : {std::pair{0, 0}, {0, 1}, {3, 95}, {0, 96}, {5, 102}, {0, 155}}) {
    for (const int64_t count : {1, 2, 5, 6, 7, 13, 20}) {
      at::Tensor targets = test::random_layer(count, rows, 3).weight.to(at::kFloat), expected = targets.clone();
      pull(matrix_pairs.const_data_ptr<Bf16Pair>(), stride, column_pairs.const_data_ptr<Bf16Pair>(), from, to, count,
           targets.data_ptr<float>());
      pull(rounded_matrix.const_data_ptr<float>(), 2 * stride, rounded_columns.const_data_ptr<float>(), 2 * from,
           2 * to, count, expected.data_ptr<float>());
      EXPECT_TRUE(targets.equal(expected)) << from << " " << to << " " << count;
    }
  }
}

}  // namespace
}  // namespace gptq
