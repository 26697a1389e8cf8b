// The AMX level's kernel, its tiles in software, gives the bits of the scalar level. On a machine with AMX the level
// itself is tested with all others in linear_w4_bits_test.cpp.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "cpu/linear_w4_cpu.h"
#include "tests/ops/amx_in_software.h"
#include "tests/reference_w4.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

class LinearW4Amx : public testing::Test {
 protected:
  LinearW4Amx() : scalar_(linear_w4_cpu_levels().back()) {}

  void SetUp() override {
    const auto levels = linear_w4_cpu_levels();
    const bool has_vnni = std::any_of(levels.begin(), levels.end(),
                                      [](const LinearW4Level& level) { return level.name == "avx512vnni"; });
    if (!has_vnni) GTEST_SKIP() << "the kernel's vectors need AVX512-VNNI";
  }

  void expect_same(const at::Tensor& x, const reference::W4Weight& weight, const std::optional<at::Tensor>& bias,
                   const char* compute) const {
    const auto run = [&](const LinearW4Level& level) {
      return linear_w4_cpu_at_level(level, weight.bits, x, weight.packed, weight.scales, weight.zeros, bias, {},
                                    weight.group_size, compute);
    };
    const at::Tensor got = run(amx_).to(at::kFloat), expected = run(scalar_).to(at::kFloat);
    EXPECT_TRUE(at::equal(got.view(at::kInt), expected.view(at::kInt)))
        << "x " << x.sizes() << " " << x.scalar_type() << ", N " << weight.scales.size(1) << ", group "
        << weight.group_size << ", zeros " << weight.zeros.has_value() << ", " << compute;
  }

  const LinearW4Level amx_{"amx in software", &kLinearW4AmxInSoftware};
  const LinearW4Level scalar_;
};

TEST_F(LinearW4Amx, EveryShapeAndOption) {
  for (const auto& shape : shapes::kAwkward)
    for (const auto& [bits, with_zeros] : {std::pair{4, false}, {4, true}, {8, false}, {8, true}})
      for (const char* compute : {"int8", "bf16", "exact"}) {
        const auto weight = reference::random_w4_weight(shape.n, shape.k, shape.group_size, with_zeros, 50, bits);
        expect_same(at::randn({shape.m, shape.k}), weight, at::randn({shape.n}), compute);
      }
}

TEST_F(LinearW4Amx, EveryNumberOfRowsAroundATile) {
  // Groups of 43 start inside atoms, and have an odd number of them; spans end inside the row.
  for (const int bits : {4, 8}) {
    const auto weight = reference::random_w4_weight(50, 1200, 43, true, 51, bits);
    for (const int64_t rows : {1, 4, 5, 6, 15, 16, 17, 20, 21, 31, 32, 33, 36, 37, 48, 65, 257, 261})
      for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf})
        expect_same(at::randn({rows, 1200}).to(dtype), weight, {}, "exact");
  }
}

TEST_F(LinearW4Amx, LargestSums) {
  for (const int bits : {4, 8}) {
    auto weight = reference::random_w4_weight(33, 260, 128, false, 52, bits);
    weight.packed =
        bits == 8 ? pack_w8(at::full({33, 260}, 255, at::kByte)) : pack_w4(at::full({33, 260}, 15, at::kByte));
    weight.zeros = at::zeros({3, 33}, at::kByte);
    for (const double value : {-1.0, 1.0}) expect_same(at::full({20, 260}, value), weight, {}, "exact");
    weight.zeros = std::nullopt;
    weight.packed.zero_();
    for (const double value : {-1.0, 1.0}) expect_same(at::full({20, 260}, value), weight, {}, "exact");
  }
}

TEST_F(LinearW4Amx, ThreadsDoNotMatter) {
  const int before = at::get_num_threads();
  const auto weight = reference::random_w4_weight(203, 520, 64, true, 53);
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    expect_same(at::randn({70, 520}), weight, {}, "exact");
  }
  at::set_num_threads(before);
}

}  // namespace
}  // namespace gptq
