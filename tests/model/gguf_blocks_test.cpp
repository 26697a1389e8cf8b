#include "model/gguf_blocks.h"

#include <cstring>

#include "tests/model/tiny_gpt2.h"
#include "tests/reference_gptq_format.h"

namespace gptq {
namespace {

CodedWeight random_weight(int64_t bits, int64_t group_size, int64_t n, int64_t k) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(7);
  const int64_t groups = group_count(k, group_size);
  CodedWeight weight;
  weight.bits = bits;
  weight.group_size = group_size;
  weight.codes = at::randint(int64_t{1} << bits, {n, k}, generator, at::kByte);
  weight.scales = (at::randn({groups, n}, generator) * 0.01).to(at::kHalf);
  weight.zeros = at::full({groups, n}, int64_t{1} << (bits - 1), at::kByte);
  return weight;
}

float half_at(const uint8_t* bytes) {
  return c10::Half(static_cast<uint16_t>(bytes[0] | bytes[1] << 8), c10::Half::from_bits());
}

// What llama.cpp makes of the blocks, byte by byte.
std::vector<float> decoded(const at::Tensor& blocks, GgufType type) {
  const int64_t size = blocks.size(2);
  std::vector<float> result;
  const auto* block = blocks.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < blocks.size(0) * blocks.size(1); ++i, block += size) {
    const float scale = half_at(block);
    for (int j = 0; j < 32; ++j) {
      if (type == GgufType::kQ8_0) {
        result.push_back(scale * static_cast<float>(static_cast<int8_t>(block[2 + j])));
        continue;
      }
      const uint8_t* nibbles = block + (type == GgufType::kQ4_1 ? 4 : 2);
      const int code = j < 16 ? nibbles[j] & 15 : nibbles[j - 16] >> 4;
      result.push_back(type == GgufType::kQ4_1 ? scale * static_cast<float>(code) + half_at(block + 2)
                                               : scale * static_cast<float>(code - 8));
    }
  }
  return result;
}

void expect_exact(const CodedWeight& weight, GgufType type, int64_t block_bytes) {
  ASSERT_EQ(gguf_type_of(weight, "fc"), type);
  const at::Tensor blocks = gguf_blocks(weight, type, "fc");
  ASSERT_EQ(blocks.sizes(), at::IntArrayRef({weight.codes.size(0), weight.codes.size(1) / 32, block_bytes}));
  ASSERT_TRUE(blocks.is_contiguous());
  const at::Tensor expected = test::dequantized(weight);
  const float* values = expected.const_data_ptr<float>();
  EXPECT_EQ(decoded(blocks, type), std::vector<float>(values, values + expected.numel()));
}

TEST(GgufBlocks, HoldSymmetricWeightsExactly) {
  for (const int64_t group_size : {32, 64, 128, 160, 1024, -1}) {
    expect_exact(random_weight(4, group_size, 5, 160), GgufType::kQ4_0, 18);
    expect_exact(random_weight(8, group_size, 5, 160), GgufType::kQ8_0, 34);
  }
}

TEST(GgufBlocks, HoldMinimaThatAreHalves) {
  CodedWeight weight = random_weight(4, 64, 6, 128);
  for (const int64_t zero : {0, 1, 2, 4}) {  // any scale times a power of two
    weight.zeros.fill_(zero);
    expect_exact(weight, GgufType::kQ4_1, 20);
  }
  weight.scales.fill_(-0.375);
  weight.zeros.copy_(at::arange(12).view({2, 6}));
  expect_exact(weight, GgufType::kQ4_1, 20);
}

TEST(GgufBlocks, HoldAsymmetricBytesThatFit) {
  CodedWeight weight = random_weight(8, 32, 4, 64);
  weight.zeros.fill_(100);
  weight.codes.clamp_max_(227);
  expect_exact(weight, GgufType::kQ8_0, 34);
}

TEST(GgufBlocks, PutColumnsWhereTheLinearHasThem) {
  // Groups change places, and columns within a group.
  const at::Tensor order = at::cat({at::arange(127, 63, -1), at::arange(0, 64).roll(5)}).to(at::kInt);
  for (const int64_t bits : {4, 8}) {
    CodedWeight weight = random_weight(bits, 64, 3, 128);
    weight.input_order = order;
    expect_exact(weight, bits == 4 ? GgufType::kQ4_0 : GgufType::kQ8_0, bits == 4 ? 18 : 34);
  }
  // Blocks of one group need not lie side by side.
  CodedWeight weight = random_weight(4, 64, 3, 128);
  weight.input_order =
      at::cat({at::arange(96, 128), at::arange(0, 32), at::arange(64, 96), at::arange(32, 64)}).to(at::kInt);
  expect_exact(weight, GgufType::kQ4_0, 18);
}

TEST(GgufBlocks, RefuseWhatTheyCannotHold) {
  const auto refuse = [](const CodedWeight& weight, const std::string& part) {
    EXPECT_ERROR(gguf_type_of(weight, "fc"), part);
  };
  for (const int64_t bits : {2, 3, 5, 6, 7}) {
    refuse(random_weight(bits, 32, 2, 64), "fc: bits must be 4 or 8 in a GGUF file, got " + std::to_string(bits));
  }
  refuse(random_weight(4, -1, 2, 80), "fc: inputs must be a multiple of 32 in a GGUF file, got 80");
  refuse(random_weight(4, 16, 2, 64), "fc: group_size must be -1 or a multiple of 32 in a GGUF file, got 16");

  CodedWeight weight = random_weight(4, 64, 4, 128);
  weight.input_order = at::arange(128, at::kInt);
  weight.input_order->slice(0, 40, 80).copy_(weight.input_order->slice(0, 40, 80).flip(0));
  refuse(weight,
         "fc: columns 32..63 must be of one group in a GGUF file, column 32 is of group 0 and column 40 of group 1");
  weight.input_order->fill_(3);
  refuse(weight, "fc: input_order must be a permutation of 0..127");

  weight = random_weight(4, 64, 4, 128);
  weight.scales.fill_(1.0009765625);  // 1 + 2^-10, the next after 1
  weight.zeros[1][2] = 7;
  weight.zeros[0][3] = 7;
  refuse(weight,
         "fc: row 2, group 1: -scale * zero point must be an f16 in a GGUF file (Q4_1), has scale 1.00098 and zero "
         "point 7");
  weight = random_weight(4, 64, 4, 128);
  weight.scales.fill_(65504);
  weight.zeros.fill_(4);
  refuse(weight, "fc: row 0, group 0: -scale * zero point must be an f16");

  weight = random_weight(8, 32, 4, 64);
  weight.zeros[1][3] = 100;
  weight.codes[3].fill_(50);
  weight.codes[3][40] = 228;
  refuse(weight,
         "fc: row 3, group 1: codes less the zero point must be in -128..127 in a GGUF file (Q8_0), are in -50..128");
}

}  // namespace
}  // namespace gptq
