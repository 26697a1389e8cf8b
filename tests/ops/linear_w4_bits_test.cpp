// The promise that linear_w4 and linear_w8 give the same bits at every level, for every thread count and batch.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "cpu/linear_w4_cpu.h"
#include "tests/reference_w4.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

using reference::random_w4_weight;
using reference::W4Weight;

at::Tensor run_at(const LinearW4Level& level, const at::Tensor& x, const W4Weight& weight,
                  const std::optional<at::Tensor>& bias, std::string_view compute) {
  return linear_w4_cpu_at_level(level, weight.bits, x, weight.packed, weight.scales, weight.zeros, bias, {},
                                weight.group_size, compute);
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.nan_to_num(7e30), y = b.nan_to_num(7e30);
  return at::equal(x.view(at::kInt), y.view(at::kInt));
}

std::string name(const shapes::Linear& s) {
  return "m " + std::to_string(s.m) + " k " + std::to_string(s.k) + " n " + std::to_string(s.n) + " group " +
         std::to_string(s.group_size);
}

// Normal values, with outliers, halfway cases, zeros, tiny and huge groups, and a NaN.
at::Tensor varied_input(int64_t m, int64_t k, uint64_t seed) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  at::Tensor x = at::randn({m, k}, generator);
  x.slice(1, 3, k, 50) *= 1000;
  if (m > 1) x[1] = (x[1] * 8).round() / 8;
  if (m > 2) x[2] *= 1e-30;
  if (m > 3) x[3] *= 1e-41;
  if (m > 4) x[4] = x[4].nan_to_num() * 1e34;
  if (m > 5) x[5][k / 2] = NAN;
  if (m > 6) x[6].slice(0, 0, k / 2).zero_();
  return x;
}

TEST(LinearW4Bits, ScalarFollowsTheDefinition) {
  const LinearW4Level scalar = linear_w4_cpu_levels().back();
  for (const auto& shape : shapes::kAwkward) {
    const int64_t m = std::min<int64_t>(shape.m, 9), n = std::min<int64_t>(shape.n, 33);
    for (const auto& [bits, with_zeros] : {std::pair{4, false}, {4, true}, {8, false}, {8, true}}) {
      const W4Weight weight = random_w4_weight(n, shape.k, shape.group_size, with_zeros, 30, bits);
      const at::Tensor x = varied_input(m, shape.k, 31), bias = at::randn({n});
      const char* computes[] = {"int8", "bf16", "exact"};
      for (int digits = 1; digits <= 3; ++digits)
        EXPECT_TRUE(same_bits(run_at(scalar, x, weight, bias, computes[digits - 1]),
                              reference::linear_w4_model(x, weight, bias, digits)))
            << name(shape) << " bits " << bits << " digits " << digits << " zeros " << with_zeros;
    }
  }
}

TEST(LinearW4Bits, EveryLevelEqualsScalar) {
  const auto levels = linear_w4_cpu_levels();
  for (const auto& shape : shapes::kAwkward)
    for (const auto& [bits, with_zeros] : {std::pair{4, false}, {4, true}, {8, false}, {8, true}})
      for (const char* compute : {"int8", "bf16", "exact"}) {
        const W4Weight weight = random_w4_weight(shape.n, shape.k, shape.group_size, with_zeros, 32, bits);
        const at::Tensor x = varied_input(shape.m, shape.k, 33), bias = at::randn({shape.n});
        const at::Tensor expected = run_at(levels.back(), x, weight, bias, compute);
        for (const auto& level : levels)
          EXPECT_TRUE(same_bits(run_at(level, x, weight, bias, compute), expected))
              << level.name << " " << name(shape) << " bits " << bits << " " << compute << " zeros " << with_zeros;
      }
}

// 16-bit sums of AVX2 and 32-bit ones of v are at their largest where all codes and digits are.
TEST(LinearW4Bits, LargestSums) {
  const auto levels = linear_w4_cpu_levels();
  for (const auto& [bits, code] : {std::pair{4, 0}, {4, 15}, {8, 0}, {8, 255}})
    for (const double value : {-1.0, 1.0, -0.99999}) {
      W4Weight weight = random_w4_weight(33, 260, 128, false, 34, bits);
      weight.codes = at::full({33, 260}, code, at::kByte);
      weight.packed = bits == 8 ? pack_w8(weight.codes) : pack_w4(weight.codes);
      weight.zeros = at::full({3, 33}, (1 << bits) - 1 - code, at::kByte);
      at::Tensor x = at::full({14, 260}, value);
      x.select(1, 0).fill_(1.0);
      for (const auto& level : levels)
        EXPECT_TRUE(same_bits(run_at(level, x, weight, {}, "exact"), reference::linear_w4_model(x, weight, {}, 3)))
            << level.name << " bits " << bits << " code " << code << " x " << value;
    }
}

// Digits 0 and 1 are both -128 in the first of these, and the number they make is just outside 16 bits.
TEST(LinearW4Bits, LowDigitsAtTheEndsOfTheirRange) {
  const auto levels = linear_w4_cpu_levels();
  at::Tensor x = at::empty({30, 260});
  for (int64_t row = 0; row < 30; ++row)
    for (int64_t column = 0; column < 260; ++column) {
      const int64_t low = std::array{-32896, -32895, -32769, 32639}[row % 4], high = (7 * row + column) % 120 - 60;
      x[row][column] = static_cast<double>(65536 * high + low) / (127 * 65536);
    }
  x.slice(1, 0, 260, 50).fill_(1.0);  // makes the scale 1 / 127
  for (const int bits : {4, 8}) {
    const W4Weight weight = random_w4_weight(33, 260, 128, true, 45, bits);
    for (const auto& level : levels)
      EXPECT_TRUE(same_bits(run_at(level, x, weight, {}, "exact"), reference::linear_w4_model(x, weight, {}, 3)))
          << level.name << " bits " << bits;
  }
}

TEST(LinearW4Bits, EveryNumberOfRowsAroundATile) {
  const auto levels = linear_w4_cpu_levels();
  // Groups of 43 start inside atoms, and have an odd number of them; spans end inside the row.
  for (const auto& [bits, with_zeros] : {std::pair{4, false}, {4, true}, {8, true}}) {
    const W4Weight weight = random_w4_weight(50, 1200, 43, with_zeros, 44, bits);
    for (const int64_t rows : {1, 2, 3, 4, 5, 6, 11, 12, 13, 16, 17, 18, 19, 31, 33, 47, 63, 64, 65, 71, 127, 129}) {
      const at::Tensor x = varied_input(rows, 1200, 46);
      for (const char* compute : {"bf16", "exact"}) {
        const at::Tensor expected = run_at(levels.back(), x, weight, {}, compute);
        for (const auto& level : levels)
          EXPECT_TRUE(same_bits(run_at(level, x, weight, {}, compute), expected))
              << level.name << " rows " << rows << " bits " << bits << " " << compute << " zeros " << with_zeros;
      }
    }
  }
}

TEST(LinearW4Bits, ThreadsDoNotMatter) {
  const int before = at::get_num_threads();
  for (const auto& shape : {shapes::Linear{1, 2304, 771, 128}, {70, 1030, 200, 64}, {300, 520, 90, -1}})
    for (const auto& level : linear_w4_cpu_levels()) {
      const W4Weight weight = random_w4_weight(shape.n, shape.k, shape.group_size, true, 35);
      const at::Tensor x = varied_input(shape.m, shape.k, 36);
      at::set_num_threads(1);
      const at::Tensor expected = run_at(level, x, weight, {}, "exact");
      for (const int threads : {2, 3, 7}) {
        at::set_num_threads(threads);
        EXPECT_TRUE(same_bits(run_at(level, x, weight, {}, "exact"), expected))
            << level.name << " " << name(shape) << " threads " << threads;
      }
    }
  at::set_num_threads(before);
}

TEST(LinearW4Bits, ARowAloneEqualsTheRowInABatch) {
  const W4Weight weight = random_w4_weight(83, 1100, 96, true, 37);
  const at::Tensor x = varied_input(261, 1100, 38), bias = at::randn({83});
  for (const auto& level : linear_w4_cpu_levels())
    for (const char* compute : {"int8", "bf16", "exact"}) {
      const at::Tensor batch = run_at(level, x, weight, bias, compute);
      for (const auto& [first, rows] : {std::pair{0, 1}, {1, 2}, {4, 3}, {8, 4}, {30, 5}, {254, 7}})
        EXPECT_TRUE(same_bits(run_at(level, x.slice(0, first, first + rows), weight, bias, compute),
                              batch.slice(0, first, first + rows)))
            << level.name << " " << compute << " rows " << first << " + " << rows;
    }
}

// Rows and columns are independent, so a weight cut anywhere in N gives the same columns.
TEST(LinearW4Bits, AColumnDoesNotDependOnItsNeighbours) {
  const W4Weight weight = random_w4_weight(150, 300, 64, true, 39);
  const at::Tensor x = varied_input(6, 300, 40);
  for (const auto& level : linear_w4_cpu_levels()) {
    const at::Tensor whole = run_at(level, x, weight, {}, "exact");
    for (const auto& [from, to] : {std::pair{0, 1}, {1, 18}, {16, 96}, {77, 150}}) {
      W4Weight part = weight;
      part.packed = pack_w4(weight.codes.slice(0, from, to));
      part.scales = weight.scales.slice(1, from, to);
      part.zeros = weight.zeros->slice(1, from, to);
      EXPECT_TRUE(same_bits(run_at(level, x, part, {}, "exact"), whole.slice(1, from, to).contiguous()))
          << level.name << " columns " << from << ".." << to;
    }
  }
}

// Values that 16-bit outputs round to: ties, both ends of the range, numbers below the normal ones.
at::Tensor scaled_rows(int64_t m, int64_t k, at::ScalarType dtype) {
  at::Tensor x = varied_input(m, k, 41).clamp(-6e4, 6e4);
  for (int64_t row = 7; row < m; ++row) x[row] *= std::pow(10.0, static_cast<double>(row % 14) - 9);
  return x.to(dtype);
}

// What a 16-bit input gives is what two digits of the widened input give, rounded.
TEST(LinearW4Bits, HalfInputsAreWidenedAndResultsRounded) {
  for (const auto& shape : {shapes::Linear{40, 300, 35, 64}, {9, 129, 17, 43}, {1, 8, 1, 128}, {23, 1031, 16, -1}}) {
    const W4Weight weight = random_w4_weight(shape.n, shape.k, shape.group_size, true, 42);
    const at::Tensor bias = at::randn({shape.n});
    for (const auto dtype : {at::kBFloat16, at::kHalf}) {
      const at::Tensor x = scaled_rows(shape.m, shape.k, dtype);
      for (const auto& level : linear_w4_cpu_levels()) {
        const at::Tensor y = run_at(level, x, weight, bias, "exact");
        const at::Tensor expected = run_at(level, x.to(at::kFloat), weight, bias, "bf16").to(dtype);
        EXPECT_EQ(y.scalar_type(), dtype);
        EXPECT_TRUE(same_bits(y.to(at::kFloat), expected.to(at::kFloat))) << level.name << " " << name(shape) << dtype;
      }
    }
  }
}

TEST(LinearW4Bits, InputOrderAndStridesAreReadInPlace) {
  const W4Weight weight = random_w4_weight(35, 203, 50, true, 43);
  const at::Tensor order = at::randperm(203).to(at::kInt);
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor wide = scaled_rows(12, 220, dtype), x = wide.slice(1, 5, 208).slice(0, 0, 12, 2);
    for (const auto& level : linear_w4_cpu_levels()) {
      const auto run = [&](const at::Tensor& input, const std::optional<at::Tensor>& columns) {
        return linear_w4_cpu_at_level(level, weight.bits, input, weight.packed, weight.scales, weight.zeros, {},
                                      columns, 50, "exact")
            .to(at::kFloat);
      };
      EXPECT_TRUE(same_bits(run(x, {}), run(x.contiguous(), {}))) << level.name << dtype;
      EXPECT_TRUE(same_bits(run(x, order), run(x.index_select(1, order), {}))) << level.name << dtype;
      EXPECT_TRUE(same_bits(run(x.t().contiguous().t(), {}), run(x.contiguous(), {}))) << level.name << dtype;
    }
  }
}

}  // namespace
}  // namespace gptq
