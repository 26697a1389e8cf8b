// linear_w4 and linear_w8 against float64, and what it does with unusual values and shapes.
#include "gptq/linear_w4.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>

#include "tests/error_of.h"
#include "tests/reference_w4.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

using reference::random_w4_weight;
using reference::W4Weight;

at::Tensor run(const at::Tensor& x, const W4Weight& weight, const std::optional<at::Tensor>& bias = {},
               std::string_view compute = "exact", const std::optional<at::Tensor>& order = {}) {
  const auto linear = weight.bits == 8 ? linear_w8 : linear_w4;
  return linear(x, weight.packed, weight.scales, weight.zeros, bias, order, weight.group_size, compute);
}

void expect_within(const at::Tensor& y, const at::Tensor& expected, const at::Tensor& bound, const std::string& what) {
  const at::Tensor excess = (y.to(at::kDouble) - expected).abs() - bound;
  EXPECT_TRUE(excess.le(0).all().item<bool>()) << what << ": off by " << excess.max().item<double>() << " too much";
}

TEST(LinearW4, WithinTheBoundOfFloat64) {
  for (const auto& shape : shapes::kAwkward)
    for (const auto& [bits, with_zeros] : {std::pair{4, false}, {4, true}, {8, false}, {8, true}})
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf})
        for (const std::string compute : {"exact", "bf16", "int8"}) {
          const W4Weight weight = random_w4_weight(shape.n, shape.k, shape.group_size, with_zeros, 7, bits);
          const at::Tensor x = at::randn({shape.m, shape.k}).to(dtype);
          const int digits = compute == "int8" ? 1 : compute == "exact" && dtype == at::kFloat ? 3 : 2;
          const at::Tensor y = run(x, weight, {}, compute);
          ASSERT_EQ(y.scalar_type(), dtype);
          ASSERT_EQ(y.sizes(), at::IntArrayRef({shape.m, shape.n}));
          expect_within(y, reference::linear_w4(x, weight), reference::linear_w4_bound(x, weight, digits, dtype),
                        "m " + std::to_string(shape.m) + " k " + std::to_string(shape.k) + " n " +
                            std::to_string(shape.n) + " " + compute + " " + at::toString(dtype) + " bits " +
                            std::to_string(bits));
        }
}

TEST(LinearW4, BiasOfEveryDtypeIsAddedOnce) {
  const W4Weight weight = random_w4_weight(33, 200, 64, true, 8);
  const at::Tensor x = at::randn({5, 200});
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    const at::Tensor bias = (at::randn({33}) * 3).to(dtype);
    EXPECT_TRUE(at::equal(run(x, weight, bias), run(x, weight) + bias.to(at::kFloat)));
  }
}

// x · wᵀ in f32, one fused multiply-add after the other.
at::Tensor plain_f32_product(const at::Tensor& x, const at::Tensor& w) {
  const int64_t m = x.size(0), k = x.size(1), n = w.size(0);
  const float *rows = x.const_data_ptr<float>(), *weights = w.const_data_ptr<float>();
  at::Tensor y = at::empty({m, n}, at::kFloat);
  for (int64_t row = 0; row < m; ++row)
    for (int64_t column = 0; column < n; ++column) {
      float sum = 0;
      for (int64_t i = 0; i < k; ++i) sum = std::fma(rows[row * k + i], weights[column * k + i], sum);
      y.mutable_data_ptr<float>()[row * n + column] = sum;
    }
  return y;
}

// The same weight, dequantized without error, is multiplied in f32 by torch, and by the plain loop. torch's blocked
// sums are the more accurate of the two; digits of a group's maximum lose to them where every group has a large
// outlier.
TEST(LinearW4, ExactIsAtLeastAsAccurateAsDenseFloat32) {
  for (const double outlier : {1.0, 10.0, 100.0}) {
    at::manual_seed(9);
    const W4Weight weight = random_w4_weight(128, 4096, 128, true, 9);
    at::Tensor x = at::randn({16, 4096});
    x.slice(1, 5, 4096, 400) *= outlier;
    const at::Tensor expected = reference::linear_w4(x, weight);
    const at::Tensor w = reference::dequantize_w4(weight).to(at::kFloat);
    const at::Tensor dense = outlier > 10 ? plain_f32_product(x, w) : at::linear(x, w);
    const double error = (run(x, weight) - expected).norm().item<double>();
    EXPECT_LE(error, (dense - expected).norm().item<double>()) << "outliers of " << outlier;
  }
}

TEST(LinearW4, AbsentZerosAreTheMiddleCode) {
  for (const int bits : {4, 8}) {
    W4Weight weight = random_w4_weight(50, 130, 64, false, 10, bits);
    const at::Tensor x = at::randn({6, 130});
    const at::Tensor y = run(x, weight);
    weight.zeros = at::full({3, 50}, bits == 8 ? 128 : 8, at::kByte);
    EXPECT_TRUE(at::equal(run(x, weight), y));
  }
}

// Codes that fit both: the same numbers in the same order of operations.
TEST(LinearW4, WiderCodesOfTheSameWeightGiveTheSameBits) {
  for (const std::string compute : {"exact", "bf16", "int8"}) {
    const W4Weight narrow = random_w4_weight(50, 1300, 96, true, 23);
    W4Weight wide = narrow;
    wide.packed = pack_w8(narrow.codes);
    wide.bits = 8;
    const at::Tensor x = at::randn({7, 1300});
    EXPECT_TRUE(at::equal(run(x, wide, {}, compute), run(x, narrow, {}, compute))) << compute;
  }
}

TEST(LinearW4, ExtremeZeros) {
  for (const int zero : {0, 15}) {
    W4Weight weight = random_w4_weight(50, 300, 128, false, 11);
    weight.codes = at::full({50, 300}, 15 - zero, at::kByte);  // the largest |code - zero| there is
    weight.packed = pack_w4(weight.codes);
    weight.zeros = at::full({3, 50}, zero, at::kByte);
    const at::Tensor x = at::full({4, 300}, -1.0);  // every column has the largest digit
    expect_within(run(x, weight), reference::linear_w4(x, weight), reference::linear_w4_bound(x, weight, 3, at::kFloat),
                  "zero " + std::to_string(zero));
  }
}

TEST(LinearW4, NonFiniteRowsComeOutAsNanAndLeaveOthersAlone) {
  const W4Weight weight = random_w4_weight(37, 300, 64, true, 12);
  const at::Tensor bias = at::randn({37});
  const at::Tensor clean = at::randn({5, 300});
  for (const float value : {NAN, INFINITY, -INFINITY})
    for (const std::string compute : {"exact", "bf16", "int8"})
      for (const int64_t column : {0, 63, 200, 299}) {
        at::Tensor x = clean.clone();
        x[2][column] = value;
        const at::Tensor y = run(x, weight, bias, compute);
        const at::Tensor expected = run(clean, weight, bias, compute);
        EXPECT_TRUE(y[2].isnan().all().item<bool>()) << value << " at " << column << " " << compute;
        for (const int64_t row : {0, 1, 3, 4}) EXPECT_TRUE(at::equal(y[row], expected[row]));
      }
}

TEST(LinearW4, GroupsOfZerosAddNothing) {
  const W4Weight weight = random_w4_weight(37, 300, 64, true, 13);
  const at::Tensor bias = at::randn({37});
  EXPECT_TRUE(at::equal(run(at::zeros({3, 300}), weight, bias), bias.expand({3, 37})));
  at::Tensor x = at::zeros({1, 300});
  x.slice(1, 64, 128) = at::randn({1, 64});
  W4Weight group = weight;
  group.codes = weight.codes.slice(1, 64, 128).contiguous();
  group.packed = pack_w4(group.codes);
  group.scales = weight.scales.slice(0, 1, 2);
  group.zeros = weight.zeros->slice(0, 1, 2);
  EXPECT_TRUE(at::equal(run(x, weight), run(x.slice(1, 64, 128), group)));
}

// A power of two goes through every step exactly while nothing is denormal, on both sides of the 2^-64 of step 2.
TEST(LinearW4, PowersOfTwoScaleExactly) {
  const W4Weight weight = random_w4_weight(37, 300, 64, true, 14);
  const at::Tensor x = at::randn({3, 300}), y = run(x, weight);
  for (const int exponent : {-100, -90, -66, -64, -62, 1, 100})
    EXPECT_TRUE(at::equal(run(x * std::ldexp(1.0, exponent), weight), y * std::ldexp(1.0, exponent))) << exponent;
}

TEST(LinearW4, TheLargestFloatsStayFiniteWhereTheResultIs) {
  W4Weight weight = random_w4_weight(20, 140, 128, false, 15);
  weight.codes = at::full({20, 140}, 15, at::kByte);
  weight.packed = pack_w4(weight.codes);
  weight.scales = at::full({2, 20}, 0.01, at::kHalf);
  at::Tensor x = at::zeros({1, 140});
  x[0][3] = FLT_MAX;
  x[0][135] = -FLT_MAX;
  x[0][136] = FLT_MAX / 2;
  expect_within(run(x, weight), reference::linear_w4(x, weight), reference::linear_w4_bound(x, weight, 3, at::kFloat),
                "FLT_MAX");
}

// Denormal input: s_x is rounded to a multiple of 2^-149 and multiplied by at most 128·|w| per column, and so is every
// partial sum.
TEST(LinearW4, DenormalInput) {
  const W4Weight weight = random_w4_weight(20, 140, 128, true, 16);
  const at::Tensor x = (at::randn({3, 140}) * 1e6).round().to(at::kDouble).mul(0x1p-149).to(at::kFloat);
  const at::Tensor w = reference::dequantize_w4(weight).abs().sum(1);
  expect_within(run(x, weight), reference::linear_w4(x, weight),
                reference::linear_w4_bound(x, weight, 3, at::kFloat) + 0x1p-150 * (128 * w + 8), "denormal");
}

TEST(LinearW4, LeadingDimensions) {
  const W4Weight weight = random_w4_weight(21, 40, 16, true, 17);
  const at::Tensor x = at::randn({2, 3, 4, 40});
  const at::Tensor flat = run(x.reshape({24, 40}), weight);
  EXPECT_TRUE(at::equal(run(x, weight), flat.view({2, 3, 4, 21})));
  EXPECT_TRUE(at::equal(run(x[1][2][3], weight), flat[23]));
  EXPECT_EQ(run(x.slice(1, 0, 0), weight).sizes(), at::IntArrayRef({2, 0, 4, 21}));
  EXPECT_EQ(run(at::empty({0, 40}), weight).sizes(), at::IntArrayRef({0, 21}));
}

TEST(LinearW4, EmptyWeights) {
  const at::Tensor bias = at::randn({3});
  EXPECT_TRUE(at::equal(run(at::empty({2, 0}), random_w4_weight(3, 0, 8, true, 18), bias), bias.expand({2, 3})));
  EXPECT_TRUE(at::equal(run(at::empty({2, 0}), random_w4_weight(3, 0, -1, false, 18)), at::zeros({2, 3})));
  EXPECT_EQ(run(at::randn({2, 5}), random_w4_weight(0, 5, 8, true, 18)).sizes(), at::IntArrayRef({2, 0}));
}

TEST(LinearW4, StridedInputsOfEveryArgument) {
  const W4Weight weight = random_w4_weight(37, 300, 64, true, 19);
  const at::Tensor x = at::randn({6, 300}), bias = at::randn({37});
  const auto strided = [](const at::Tensor& t) { return at::stack({t, t}, -1).select(-1, 0); };
  W4Weight other = weight;
  other.packed = strided(weight.packed);
  other.scales = strided(weight.scales);
  other.zeros = strided(*weight.zeros);
  EXPECT_TRUE(at::equal(run(strided(x), other, strided(bias)), run(x, weight, bias)));
  EXPECT_TRUE(at::equal(run(x.t().contiguous().t(), weight, bias), run(x, weight, bias)));
}

TEST(LinearW4, StorageOffsetsThatAlignNothing) {
  const W4Weight weight = random_w4_weight(37, 300, 64, true, 20);
  const at::Tensor x = at::randn({6, 300}), bias = at::randn({37});
  const auto offset = [](const at::Tensor& t) {
    return at::cat({t.flatten().slice(0, 0, 1), t.flatten()}).slice(0, 1).view(t.sizes());
  };
  W4Weight other = weight;
  other.packed = offset(weight.packed);
  other.scales = offset(weight.scales);
  other.zeros = offset(*weight.zeros);
  ASSERT_TRUE(other.packed.is_contiguous());
  EXPECT_TRUE(at::equal(run(offset(x), other, offset(bias)), run(x, weight, bias)));
}

TEST(LinearW4, InputOrderGathersColumns) {
  const W4Weight weight = random_w4_weight(37, 300, 64, true, 21);
  const at::Tensor x = at::randn({2, 3, 300}), order = at::randperm(300, at::kInt);
  EXPECT_TRUE(at::equal(run(x, weight, {}, "exact", order), run(x.index_select(2, order), weight)));
  for (const int column : {-1, 300}) {
    at::Tensor wrong = order.clone();
    wrong[17] = column;
    EXPECT_ERROR(run(x, weight, {}, "exact", wrong),
                 "linear_w4: input_order must hold columns in 0..299, got " + std::to_string(column) + " at 17");
  }
}

TEST(LinearW4, Errors) {
  const W4Weight weight = random_w4_weight(37, 300, 64, true, 22);
  const auto& [codes, packed, scales, zeros, group_size, bits] = weight;
  const at::Tensor x = at::randn({2, 300}), bias = at::randn({37});
  const std::optional<at::Tensor> none;
  EXPECT_ERROR(run(x.to(at::kDouble), weight), "linear_w4: input must be Float, BFloat16 or Half, got Double");
  EXPECT_ERROR(run(at::ones({}), weight), "linear_w4: input must have at least one dimension, got a scalar");
  EXPECT_ERROR(run(at::randn({2, 305}), weight),
               "linear_w4: packed must be [ceil(N/16), ceil(K/8), 64] = [3, 39, 64], got [3, 38, 64]");
  EXPECT_ERROR(linear_w4(x, packed, scales, zeros, none, none, 0),
               "linear_w4: group_size must be -1 or at least 1, got 0");
  EXPECT_ERROR(run(x, weight, none, "int4"),
               "linear_w4: compute must be \"exact\", \"bf16\" or \"int8\", got \"int4\"");
  EXPECT_ERROR(linear_w4(x, packed.to(at::kInt), scales, zeros, none, none, 64),
               "linear_w4: packed must be Byte, got Int");
  EXPECT_ERROR(linear_w4(x, packed.slice(1, 1), scales, zeros, none, none, 64),
               "linear_w4: packed must be [ceil(N/16), ceil(K/8), 64] = [3, 38, 64], got [3, 37, 64]");
  EXPECT_ERROR(linear_w4(x, packed, scales.to(at::kFloat), zeros, none, none, 64),
               "linear_w4: scales must be Half, got Float");
  EXPECT_ERROR(linear_w4(x, packed, scales[0], zeros, none, none, 64),
               "linear_w4: scales must be [n_groups, N], got [37]");
  EXPECT_ERROR(linear_w4(x, packed, scales, zeros, none, none, 32),
               "linear_w4: scales must be [n_groups, N] = [10, 37], got [5, 37]");
  EXPECT_ERROR(linear_w4(x, packed, scales, zeros->to(at::kInt), none, none, 64),
               "linear_w4: zeros must be Byte, got Int");
  EXPECT_ERROR(linear_w4(x, packed, scales, zeros->slice(1, 1), none, none, 64),
               "linear_w4: zeros must be [n_groups, N] = [5, 37], got [5, 36]");
  EXPECT_ERROR(run(x, weight, bias.to(at::kDouble)), "linear_w4: bias must be Float, BFloat16 or Half, got Double");
  EXPECT_ERROR(run(x, weight, bias.slice(0, 1)), "linear_w4: bias must be [N] = [37], got [36]");
  EXPECT_ERROR(run(x, weight, none, "exact", at::randperm(300, at::kLong)),
               "linear_w4: input_order must be Int, got Long");
  EXPECT_ERROR(run(x, weight, none, "exact", at::randperm(299, at::kInt)),
               "linear_w4: input_order must be [K] = [300], got [299]");
  EXPECT_ERROR(run(x, weight, bias.to(at::kMeta)), "linear_w4: bias must be on input's device cpu, got meta");
  EXPECT_ERROR(linear_w8(x, packed, scales, zeros, none, none, 64),
               "linear_w8: packed must be [ceil(N/16), ceil(K/8), 128] = [3, 38, 128], got [3, 38, 64]");
  EXPECT_ERROR(linear_w4(x, pack_w8(codes), scales, zeros, none, none, 64),
               "linear_w4: packed must be [ceil(N/16), ceil(K/8), 64] = [3, 38, 64], got [3, 38, 128]");
}

}  // namespace
}  // namespace gptq
