#include "gptq/pack_w4.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "pack_w4_any.h"
#include "tests/error_of.h"
#include "tests/reference_w4.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

at::Tensor random_codes(int64_t n, int64_t k, int bits = 4) {
  return at::randint(0, 1 << bits, {n, k}, at::kByte);
}

TEST(PackW4, UnpackIsTheInverse) {
  for (const auto& shape : shapes::kAwkward) {
    const at::Tensor codes = random_codes(shape.n, shape.k);
    const at::Tensor packed = pack_w4(codes);
    EXPECT_EQ(packed.sizes(), at::IntArrayRef({(shape.n + 15) / 16, (shape.k + 7) / 8, 64}));
    EXPECT_TRUE(at::equal(unpack_w4(packed, shape.n, shape.k), codes)) << shape.n << " x " << shape.k;
  }
}

TEST(PackW8, UnpackIsTheInverse) {
  for (const auto& shape : shapes::kAwkward) {
    const at::Tensor codes = random_codes(shape.n, shape.k, 8);
    const at::Tensor packed = pack_w8(codes);
    EXPECT_EQ(packed.sizes(), at::IntArrayRef({(shape.n + 15) / 16, (shape.k + 7) / 8, 128}));
    EXPECT_TRUE(at::equal(unpack_w8(packed, shape.n, shape.k), codes)) << shape.n << " x " << shape.k;
  }
  EXPECT_EQ(pack_w8(random_codes(0, 5, 8)).sizes(), at::IntArrayRef({0, 1, 128}));
}

TEST(PackW4, EmptyWeights) {
  EXPECT_EQ(pack_w4(random_codes(0, 5)).sizes(), at::IntArrayRef({0, 1, 64}));
  EXPECT_EQ(pack_w4(random_codes(5, 0)).sizes(), at::IntArrayRef({1, 0, 64}));
  EXPECT_EQ(unpack_w4(pack_w4(random_codes(0, 5)), 0, 5).sizes(), at::IntArrayRef({0, 5}));
}

// Row 1 of 17 and row 16, columns 0..7 and the one column of the second atom, spelled out by hand.
TEST(PackW4, GoldenBytes) {
  at::Tensor codes = at::zeros({17, 9}, at::kByte);
  const uint8_t row[9] = {0x1, 0x2, 0x3, 0x4, 0xa, 0xb, 0xc, 0xd, 0xf};
  for (int64_t k = 0; k < 9; ++k) {
    codes[1][k] = row[k];
    codes[16][k] = 15 - row[k];
  }
  const at::Tensor packed = pack_w4(codes);
  ASSERT_EQ(packed.sizes(), at::IntArrayRef({2, 2, 64}));
  at::Tensor expected = at::zeros({2, 2, 64}, at::kByte);
  const uint8_t first[4] = {0xa1, 0xb2, 0xc3, 0xd4}, second[4] = {0x5e, 0x4d, 0x3c, 0x2b};
  for (int64_t i = 0; i < 4; ++i) {
    expected[0][0][4 + i] = first[i];
    expected[1][0][i] = second[i];
  }
  expected[0][1][4] = 0x0f;
  EXPECT_TRUE(at::equal(packed, expected)) << packed;
}

// Row 1 of 17 and row 16, columns 0..8.
TEST(PackW8, GoldenBytes) {
  at::Tensor codes = at::zeros({17, 9}, at::kByte), expected = at::zeros({2, 2, 128}, at::kByte);
  for (int64_t k = 0; k < 9; ++k) {
    codes[1][k] = 0x31 * (k + 1) % 256;
    codes[16][k] = 255 - k;
  }
  for (int64_t i = 0; i < 4; ++i) {
    expected[0][0][4 + i] = 0x31 * (i + 1) % 256;
    expected[0][0][64 + 4 + i] = 0x31 * (i + 5) % 256;
    expected[1][0][i] = 255 - i;
    expected[1][0][64 + i] = 251 - i;
  }
  expected[0][1][4] = 0x31 * 9 % 256;
  expected[1][1][0] = 247;
  EXPECT_TRUE(at::equal(pack_w8(codes), expected)) << pack_w8(codes);
}

TEST(PackW4, PaddingIsZero) {
  const at::Tensor packed = pack_w4(at::full({3, 5}, 15, at::kByte));
  EXPECT_EQ(unpack_w4(packed, 16, 8).sum().item<int64_t>(), 3 * 5 * 15);
}

TEST(PackW4, StridedAndOffsetInputs) {
  const at::Tensor wide = random_codes(40, 50);
  const at::Tensor codes = wide.slice(0, 1, 38, 2).slice(1, 3, 48, 3);
  const at::Tensor packed = pack_w4(codes);
  EXPECT_TRUE(at::equal(packed, pack_w4(codes.contiguous())));
  const at::Tensor strided = at::stack({packed, packed}, -1).select(-1, 1);
  EXPECT_TRUE(at::equal(unpack_w4(strided, codes.size(0), codes.size(1)), codes));
}

// A code less its zero is at most 9 bits and a scale 11, so the products are exact in f32.
TEST(DequantizeW4, EqualsTheReference) {
  for (const auto& shape : shapes::kAwkward)
    for (const auto& [bits, with_zeros] : {std::pair{4, false}, {4, true}, {8, false}, {8, true}}) {
      const auto weight = reference::random_w4_weight(shape.n, shape.k, shape.group_size, with_zeros, 1, bits);
      const auto dequantize = bits == 8 ? dequantize_w8 : dequantize_w4;
      const at::Tensor w = dequantize(weight.packed, weight.scales, weight.zeros, shape.k, shape.group_size);
      EXPECT_EQ(w.scalar_type(), at::kFloat);
      EXPECT_TRUE(at::equal(w.to(at::kDouble), reference::dequantize_w4(weight))) << shape.n << " x " << shape.k;
    }
}

// What CUDA tensors are packed by runs on any device, this one too.
TEST(PackW4Any, GivesWhatTheKernelsGive) {
  for (const auto& shape : shapes::kAwkward)
    for (const auto& [bits, with_zeros] : {std::pair{4, false}, {4, true}, {8, false}, {8, true}}) {
      const auto weight = reference::random_w4_weight(shape.n, shape.k, shape.group_size, with_zeros, 4, bits);
      EXPECT_TRUE(at::equal(pack_any(bits, weight.codes), weight.packed));
      EXPECT_TRUE(at::equal(unpack_any(bits, weight.packed, shape.n, shape.k), weight.codes));
      const int64_t width = shape.group_size == -1 ? shape.k : shape.group_size;
      const at::Tensor w = dequantize_any(bits, weight.packed, weight.scales, weight.zeros, shape.k, width);
      EXPECT_TRUE(at::equal(w.to(at::kDouble), reference::dequantize_w4(weight))) << shape.n << " x " << shape.k;
    }
  EXPECT_TRUE(at::equal(pack_any(4, random_codes(0, 5)), pack_w4(random_codes(0, 5))));
}

TEST(DequantizeW4, GroupSizeZeroMeansEvenGroups) {
  const auto weight = reference::random_w4_weight(20, 96, 32, true, 2);
  EXPECT_TRUE(at::equal(dequantize_w4(weight.packed, weight.scales, weight.zeros, 96),
                        dequantize_w4(weight.packed, weight.scales, weight.zeros, 96, 32)));
  const auto uneven = reference::random_w4_weight(20, 97, 32, true, 2);
  EXPECT_ERROR(dequantize_w4(uneven.packed, uneven.scales, uneven.zeros, 97),
               "dequantize_w4: group_size must be given where k = 97 is not a multiple of n_groups = 4");
}

TEST(PackW4, Errors) {
  at::Tensor codes = random_codes(3, 5);
  EXPECT_ERROR(pack_w4(codes.to(at::kInt)), "pack_w4: codes must be Byte, got Int");
  EXPECT_ERROR(pack_w4(codes.flatten()), "pack_w4: codes must be [N, K], got [15]");
  codes[2][1] = 16;
  EXPECT_ERROR(pack_w4(codes), "pack_w4: codes must be in 0..15, got 16 at [2, 1]");
}

TEST(UnpackW4, Errors) {
  const at::Tensor packed = pack_w4(random_codes(3, 5));
  EXPECT_ERROR(unpack_w4(packed.to(at::kInt), 3, 5), "unpack_w4: packed must be Byte, got Int");
  EXPECT_ERROR(unpack_w4(packed, 17, 5),
               "unpack_w4: packed must be [ceil(N/16), ceil(K/8), 64] = [2, 1, 64], got [1, 1, 64]");
  EXPECT_ERROR(unpack_w8(packed, 3, 5),
               "unpack_w8: packed must be [ceil(N/16), ceil(K/8), 128] = [1, 1, 128], got [1, 1, 64]");
  EXPECT_ERROR(unpack_w4(packed, 3, -1), "unpack_w4: n and k must not be negative, got n = 3, k = -1");
}

TEST(DequantizeW4, Errors) {
  const auto weight = reference::random_w4_weight(20, 96, 32, true, 3);
  const auto& [codes, packed, scales, zeros, group_size, bits] = weight;
  EXPECT_ERROR(dequantize_w4(packed, scales.to(at::kFloat), zeros, 96),
               "dequantize_w4: scales must be Half, got Float");
  EXPECT_ERROR(dequantize_w4(packed, scales[0], zeros, 96), "dequantize_w4: scales must be [n_groups, N], got [20]");
  EXPECT_ERROR(dequantize_w4(packed, scales, zeros, 96, -2), "group_size must be -1, 0 or at least 1, got -2");
  EXPECT_ERROR(dequantize_w4(packed, scales, zeros, 96, 48), "scales must be [n_groups, N] = [2, 20], got [3, 20]");
  EXPECT_ERROR(dequantize_w4(packed, scales, zeros->to(at::kInt), 96), "dequantize_w4: zeros must be Byte, got Int");
  EXPECT_ERROR(dequantize_w4(packed, scales, zeros->slice(0, 1), 96),
               "zeros must be [n_groups, N] = [3, 20], got [2, 20]");
  EXPECT_ERROR(dequantize_w4(packed, scales, zeros, 105), "packed must be [ceil(N/16), ceil(K/8), 64] = [2, 14, 64]");
}

}  // namespace
}  // namespace gptq
