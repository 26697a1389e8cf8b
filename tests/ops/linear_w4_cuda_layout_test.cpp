// The index functions of the CUDA kernels, run on the host: the groups that a cursor walks, and one warp's tile, its
// registers filled as the kernel fills them and multiplied as PTX describes mma.m16n8k32.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <set>
#include <vector>

#include "cuda/linear_w4_layout.h"
#include "linear_w4_check.h"
#include "tests/reference_w4.h"
#include "tests/shapes.h"

namespace gptq {
namespace {

TEST(LinearW4CudaLayout, TheCursorWalksTheGroups) {
  for (const auto& shape : shapes::kAwkward) {
    const int64_t width = shape.group_size == -1 ? shape.k : std::min(shape.group_size, shape.k);
    const auto groups = linear_w4_groups(shape.k, shape.group_size);
    ASSERT_EQ(group_total(shape.k, width), static_cast<int64_t>(groups.size()));
    ASSERT_EQ(span_total(shape.k, width), groups.back().begin / kSpan + 1);
    // From the start of every span, as slices of the device begin there.
    for (int64_t span = 0; span < span_total(shape.k, width); ++span) {
      GroupCursor cursor(shape.k, width, span * kSpan);
      for (size_t g = 0; g < groups.size(); ++g) {
        if (groups[g].begin < span * kSpan) continue;
        ASSERT_FALSE(cursor.done());
        ASSERT_EQ(cursor.group, static_cast<int64_t>(g));
        EXPECT_EQ(cursor.begin, groups[g].begin);
        EXPECT_EQ(cursor.end(), groups[g].end);
        EXPECT_EQ(cursor.weight_group, groups[g].weight_group);
        EXPECT_EQ(cursor.first_atom(), groups[g].first_atom);
        EXPECT_EQ(cursor.atoms(), groups[g].atoms);
        EXPECT_LE(cursor.atoms(), kGroupAtoms);
        GroupCursor next = cursor;
        next.advance();
        EXPECT_EQ(next.done() || next.span() != cursor.span(), groups[g].ends_span);
        cursor = next;
      }
      EXPECT_TRUE(cursor.done());
    }
  }
}

using Fragment = std::array<uint32_t, 4>;

uint8_t byte_of(uint32_t word, int64_t i) {
  return static_cast<uint8_t>(word >> (8 * i));
}

// A lane's part of 16 columns by four atoms, as the kernels read it from where they put it.
Fragment weight_fragment(const uint8_t* atoms, int bits, int lane) {
  std::vector<uint8_t> staged(staged_bytes(bits));
  for (int byte = 0; byte < 4 * atom_bytes(bits); ++byte) staged[staged_byte(bits, byte)] = atoms[byte];
  const int from = lane_atom(lane) * static_cast<int>(atom_bytes(bits)) + lane_byte(lane);
  uint32_t first[2], second[2];
  std::memcpy(first, &staged[staged_byte(bits, from)], sizeof(first));
  if (bits == 8) {
    std::memcpy(second, &staged[staged_byte(bits, from + 64)], sizeof(second));
    return {first[0], first[1], second[0], second[1]};
  }
  return {nibbles(first[0], 0), nibbles(first[1], 0), nibbles(first[0], 1), nibbles(first[1], 1)};
}

TEST(LinearW4CudaLayout, HalfAWarpTouchesEveryBankOnce) {
  for (const int bits : {4, 8})
    for (int first = 0; first < 32; first += 16)
      for (const int half : {0, bits == 8 ? 64 : 0}) {
        std::set<int> banks;
        for (int lane = first; lane < first + 16; ++lane) {
          const int from = lane_atom(lane) * static_cast<int>(atom_bytes(bits)) + lane_byte(lane) + half;
          banks.insert(staged_byte(bits, from) / 8 % 16);
        }
        EXPECT_EQ(banks.size(), 16) << bits << " bits, from lane " << first << " and byte " << half;
      }
}

TEST(LinearW4CudaLayout, AWarpMultipliesItsTile) {
  constexpr int64_t kColumns = 32;
  for (const int bits : {4, 8}) {
    const at::Tensor codes = at::randint(0, 1 << bits, {16, kColumns}, at::kByte);
    const at::Tensor packed = bits == 8 ? pack_w8(codes) : pack_w4(codes);
    const at::Tensor digits = at::randint(-128, 128, {8, kColumns}, at::kChar);
    std::array<Fragment, 32> weights;
    std::array<std::array<uint32_t, 2>, 32> inputs;
    for (int lane = 0; lane < 32; ++lane) {
      weights[lane] = weight_fragment(packed.const_data_ptr<uint8_t>(), bits, lane);
      // The row of one digit and step is [token][32 columns], as this tensor is.
      std::memcpy(inputs[lane].data(), digits.const_data_ptr<int8_t>() + 8 * lane, 8);
    }
    const at::Tensor expected = codes.to(at::kInt).matmul(digits.to(at::kInt).t());  // [16 columns of y, 8 tokens]
    for (int lane = 0; lane < 32; ++lane)
      for (int sum = 0; sum < 4; ++sum) {
        // PTX: sum i of lane 4·g + t is row g (+ 8 from i = 2 on) and column 2·t + i % 2; byte b of register r of the
        // weights of lane 4·g + t is row g (+ 8 if r is odd) and k = 4·t + b (+ 16 from r = 2 on); byte b of register r
        // of the inputs is k = 4·t + b + 16·r of column g.
        const int row = lane / 4 + sum / 2 * 8, column = lane % 4 * 2 + sum % 2;
        int64_t total = 0;
        for (int k = 0; k < kColumns; ++k) {
          const Fragment& a = weights[row % 8 * 4 + k % 16 / 4];
          const auto& b = inputs[column * 4 + k % 16 / 4];
          total += byte_of(a[row / 8 + k / 16 * 2], k % 4) * static_cast<int8_t>(byte_of(b[k / 16], k % 4));
        }
        EXPECT_EQ(total, expected[sum_column(lane, sum)][sum_token(lane, sum)].item<int>())
            << bits << " bits, lane " << lane << ", sum " << sum;
      }
  }
}

TEST(LinearW4CudaLayout, RecordsDoNotOverlapAndAreAligned) {
  for (const int digits : {1, 2, 3}) {
    EXPECT_EQ(record_byte(0, 5, 1, digits), record_header_bytes(digits) + 5 * digits * 8 * 32);
    EXPECT_EQ(record_byte(1, 5, 0, digits), 5 * record_byte(0, 5, 1, digits));
    EXPECT_EQ(record_bytes(digits) % 16, 0);
  }
}

}  // namespace
}  // namespace gptq
