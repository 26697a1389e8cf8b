#include "quant/gradient_factor.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

template <typename T>
constexpr auto kType = std::is_same_v<T, float> ? at::kFloat : at::kDouble;

// Errors of a strip as GradientFactor reads them: [K + K % 2][rows].
template <typename T>
at::Tensor strip_of(const at::Tensor& errors) {
  return at::constant_pad_nd(errors.t().to(kType<T>), {0, 0, 0, errors.size(1) % 2}).contiguous();
}

template <typename T>
at::Tensor gradients_of(const GradientFactor<T>& factor, const at::Tensor& errors, const GradientStrip& strip,
                        int64_t first, int64_t count) {
  at::Tensor gradients = at::zeros({count, kStripRows<T>}, kType<T>);
  for (int64_t part = 0; part < factor.parts(); ++part) {
    factor.add_part(part, errors.const_data_ptr<T>(), strip, first, count, gradients.data_ptr<T>());
  }
  return gradients.t().to(at::kDouble);
}

template <typename T>
class GradientFactorTest : public testing::Test {};
using Floats = testing::Types<float, double>;
TYPED_TEST_SUITE(GradientFactorTest, Floats);

// What the errors of E and H - U Uᵀ in bfloat16 (2^-9 each), and those of float32, may amount to: as H - U Uᵀ is
// positive semidefinite, its entries are at most sqrt(H_jj H_cc). Float64 sums have a rounding error for each term.
template <typename T>
at::Tensor bound(const at::Tensor& errors, const at::Tensor& hessian) {
  const at::Tensor root = hessian.diagonal().sqrt();
  const auto terms = static_cast<double>(hessian.size(0) + 40);
  const double rounding = std::is_same_v<T, float> ? 0x1.1p-8 + terms * 0x1p-23 : terms * 0x1p-52;
  return rounding * errors.abs().mv(root).unsqueeze(1) * root;
}

TYPED_TEST(GradientFactorTest, GradientsAreErrorsTimesHessian) {
  using T = TypeParam;
  for (const int64_t k : {1, 2, 15, 16, 17, 97, 1027}) {
    const test::RandomLayer layer = test::random_layer(kStripRows<T>, k, 31 + k);
    const at::Tensor errors = layer.weight.to(kType<T>).to(at::kDouble);
    const at::Tensor strip_errors = strip_of<T>(errors);
    const GradientFactor<T> factor(layer.hessian.to(kType<T>));
    const GradientStrip strip = factor.make_strip(k);
    factor.load(strip_errors.template const_data_ptr<T>(), strip);
    const at::Tensor exact = errors.mm(layer.hessian.to(kType<T>).to(at::kDouble));
    const at::Tensor most = bound<T>(errors, layer.hessian);
    for (const int64_t first : {int64_t{0}, k / 3, k - 1}) {
      const int64_t count = std::min<int64_t>(33, k - first);
      const at::Tensor difference =
          (gradients_of(factor, strip_errors, strip, first, count) - exact.narrow(1, first, count)).abs();
      EXPECT_TRUE((difference <= most.narrow(1, first, count)).all().item<bool>()) << k << " from " << first;
    }
  }
}

TYPED_TEST(GradientFactorTest, ChangesOfAGroupAreTakenIn) {
  using T = TypeParam;
  const int64_t k = 101;
  const test::RandomLayer layer = test::random_layer(kStripRows<T>, k, 47);
  const GradientFactor<T> factor(layer.hessian.to(kType<T>));
  at::Tensor errors = strip_of<T>(layer.weight);
  const GradientStrip strip = factor.make_strip(40), anew = factor.make_strip(40);
  factor.load(errors.const_data_ptr<T>(), strip);
  for (const auto& [first, count] : {std::pair{0, 40}, {33, 7}, {60, 1}, {61, 40}}) {
    factor.before_change(errors.const_data_ptr<T>(), first, count, strip);
    errors.narrow(0, first, count).mul_(-0.7);
    factor.after_change(errors.const_data_ptr<T>(), first, count, strip);
  }
  factor.load(errors.const_data_ptr<T>(), anew);
  const at::Tensor difference = gradients_of(factor, errors, strip, 0, k) - gradients_of(factor, errors, anew, 0, k);
  // Both round the same errors; the sums E U differ by the float32 roundings of four changes of it.
  const at::Tensor most = bound<T>(layer.weight, layer.hessian) * 0x1p-8;
  EXPECT_TRUE((difference.abs() <= most).all().item<bool>());
}

// The columns share one strong direction, and the errors have next to nothing of it, which is what a sweep leaves.
TEST(GradientFactor, AStrongCommonDirectionDoesNotDrownTheRest) {
  const int64_t k = 512, rows = kStripRows<float>;
  for (const double strength : {1, 10, 100}) {
    const test::RandomLayer layer = test::random_layer(rows, k, 53);
    const at::Tensor direction = test::random_layer(1, k, 59).weight;
    const at::Tensor hessian = (layer.hessian + strength * strength * direction.t().mm(direction)).to(at::kFloat);
    const at::Tensor along = layer.weight.mm(direction.t()) / direction.square().sum();
    const at::Tensor errors = (layer.weight - along.mm(direction)).to(at::kFloat).to(at::kDouble);
    const at::Tensor strip_errors = strip_of<float>(errors);
    const GradientFactor<float> factor(hessian);
    const GradientStrip strip = factor.make_strip(k);
    factor.load(strip_errors.const_data_ptr<float>(), strip);
    const at::Tensor exact = errors.mm(hessian.to(at::kDouble));
    const at::Tensor noise = gradients_of(factor, strip_errors, strip, 0, k) - exact;
    // A gradient that is off by d moves a code by up to d / H_kk from its best place, at a cost of d² / H_kk.
    const double cost = (noise.square() / hessian.diagonal()).sum().item<double>();
    EXPECT_LT(cost, 1e-2 * (exact * errors).sum().item<double>()) << strength;
  }
}

}  // namespace
}  // namespace gptq
