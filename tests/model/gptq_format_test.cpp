#include "model/gptq_format.h"

#include <cmath>

#include "model/checkpoint.h"
#include "tests/model/tiny_gpt2.h"
#include "tests/reference_gptq_format.h"

namespace gptq {
namespace {

using test::dequantized;
using test::reference_pack;
using test::reference_unpack;

using Table = std::vector<std::vector<int64_t>>;

// A linear in the GPTQ format, packed by the reference, and what it stands for.
struct Linear {
  int64_t bits, group_size, n, k;
  Table codes;                  // [K][N]
  Table zeros;                  // [N][n_groups]
  std::vector<int64_t> groups;  // of each column
  GptqTensors stored;
  at::Tensor weight;  // f32 [N, K]: (code - zero) · scale
};

struct Case {
  int64_t bits, group_size, n, k;
  GptqZeros zeros = GptqZeros::kLessOne;
  bool symmetric = false;
  bool shuffled = false;
};

// The words of zero points as gptqmodel makes them: less the word of ones, each word by itself.
at::Tensor less_one_by_word(const at::Tensor& plain, int64_t bits) {
  int64_t ones = 0;
  for (int64_t bit = 0; bit < 32; bit += bits) ones += int64_t{1} << bit;
  const at::Tensor wide = plain.to(at::kLong).sub(ones).bitwise_and(0xffffffff);
  return at::where(wide.ge(int64_t{1} << 31), wide.sub(int64_t{1} << 32), wide).to(at::kInt);
}

at::Tensor stored_zeros(Table zeros, int64_t bits, GptqZeros form) {
  if (form == GptqZeros::kLessOne || (form == GptqZeros::kLessOneByWord && bits == 3)) {
    for (auto& row : zeros) {
      for (auto& zero : row) zero = zero == 0 ? (1 << bits) - 1 : zero - 1;
    }
    return reference_pack(zeros, bits).t().contiguous();
  }
  const at::Tensor plain = reference_pack(zeros, bits).t().contiguous();
  return form == GptqZeros::kPlain ? plain : less_one_by_word(plain, bits);
}

Linear make_linear(const Case& c) {
  const int64_t groups = group_count(c.k, c.group_size);
  Linear linear{c.bits, c.group_size, c.n, c.k, {}, {}, {}, {}, at::empty({c.n, c.k})};
  const auto random = [&](int64_t rows, int64_t columns) {
    Table table(static_cast<size_t>(rows));
    for (auto& row : table) row = test::random_ids(columns, 1 << c.bits, static_cast<uint64_t>(&row - &table[0] + 7));
    return table;
  };
  linear.codes = random(c.k, c.n);
  linear.zeros = c.symmetric ? Table(static_cast<size_t>(c.n),
                                     std::vector<int64_t>(static_cast<size_t>(groups), 1 << (c.bits - 1)))
                             : random(c.n, groups);
  const at::Tensor columns = c.shuffled ? at::randperm(c.k) : at::arange(c.k);
  for (int64_t k = 0; k < c.k; ++k) {
    linear.groups.push_back(c.group_size == -1 ? 0 : columns[k].item<int64_t>() / c.group_size);
  }
  linear.stored.qweight = reference_pack(linear.codes, c.bits);
  linear.stored.qzeros = stored_zeros(linear.zeros, c.bits, c.zeros);
  linear.stored.scales = at::randn({groups, c.n}).to(at::kHalf);
  linear.stored.g_idx = at::tensor(linear.groups).to(at::kInt);
  for (int64_t k = 0; k < c.k; ++k) {
    const int64_t group = linear.groups[static_cast<size_t>(k)];
    for (int64_t n = 0; n < c.n; ++n) {
      const int64_t code = linear.codes[static_cast<size_t>(k)][static_cast<size_t>(n)];
      const int64_t zero = linear.zeros[static_cast<size_t>(n)][static_cast<size_t>(group)];
      linear.weight[n][k] = linear.stored.scales[group][n].to(at::kFloat) * static_cast<double>(code - zero);
    }
  }
  return linear;
}

std::vector<Case> cases() {
  std::vector<Case> result;
  for (const int64_t bits : {2, 3, 4, 8}) {
    const int64_t step = bits == 3 ? 32 : 32 / bits;  // the fewest that fill whole words
    for (const auto form : {GptqZeros::kPlain, GptqZeros::kLessOne, GptqZeros::kLessOneByWord}) {
      for (const bool symmetric : {false, true}) {
        result.push_back({bits, 16, step, 2 * 32, form, symmetric, false});
        result.push_back({bits, 16, 3 * step, 3 * 32, form, symmetric, true});
        result.push_back({bits, -1, 5 * step, step, form, symmetric, true});
        result.push_back({bits, 32, step, 32 + 2 * step, form, symmetric, true});  // the last group may be short
        result.push_back({bits, 64, step, 32, form, symmetric, false});            // one group, of fewer than its size
      }
    }
  }
  return result;
}

std::string text(const Case& c) {
  return c10::str("bits ", c.bits, " group_size ", c.group_size, " N ", c.n, " K ", c.k, " form ",
                  static_cast<int>(c.zeros), " symmetric ", c.symmetric, " shuffled ", c.shuffled);
}

TEST(GptqFormat, UnpacksWhatTheReferencePacks) {
  for (const Case& c : cases()) {
    const Linear linear = make_linear(c);
    auto weight = unpack_gptq(linear.stored, {c.bits, c.group_size, c.zeros, c.symmetric}, "layer");
    EXPECT_TRUE(dequantized(weight).equal(linear.weight)) << text(c);
    EXPECT_TRUE(weight.scales.equal(linear.stored.scales)) << text(c);
    EXPECT_EQ(weight.input_order.has_value(), c.shuffled && c.group_size != -1 && c.k > c.group_size) << text(c);
    if (c.shuffled) continue;
    GptqTensors without = linear.stored;
    without.g_idx.reset();
    weight = unpack_gptq(without, {c.bits, c.group_size, c.zeros, c.symmetric}, "layer");
    EXPECT_TRUE(dequantized(weight).equal(linear.weight)) << text(c);
  }
}

TEST(GptqFormat, PacksToTheReferencesWords) {
  for (const Case& c : cases()) {
    if (c.zeros == GptqZeros::kLessOneByWord) continue;
    const Linear linear = make_linear(c);
    const auto weight = unpack_gptq(linear.stored, {c.bits, c.group_size, c.zeros, c.symmetric}, "layer");
    const GptqTensors packed = pack_gptq(weight, c.zeros == GptqZeros::kPlain, "layer");
    EXPECT_TRUE(packed.qweight.equal(linear.stored.qweight)) << text(c);
    EXPECT_TRUE(packed.qzeros.equal(linear.stored.qzeros)) << text(c);
    EXPECT_TRUE(packed.scales.equal(linear.stored.scales)) << text(c);
    EXPECT_TRUE(packed.g_idx->equal(*linear.stored.g_idx)) << text(c);
    EXPECT_EQ(reference_unpack(packed.qweight, c.bits), linear.codes) << text(c);
  }
}

TEST(GptqFormat, ThePackedFormGoesThereAndBack) {
  for (const Case& c : cases()) {
    if (c.bits == 8 && c.group_size != -1 && c.k % c.group_size != 0) continue;
    Linear linear = make_linear(c);
    const auto weight = unpack_gptq(linear.stored, {c.bits, c.group_size, c.zeros, c.symmetric}, "layer");
    const auto back = unpack_weight(pack_weight(weight), c.n, c.k);
    EXPECT_TRUE(back.codes.equal(weight.codes)) << text(c);
    EXPECT_TRUE(back.scales.equal(weight.scales)) << text(c);
    EXPECT_TRUE(back.zeros.equal(weight.zeros)) << text(c);
    ASSERT_EQ(back.input_order.has_value(), weight.input_order.has_value()) << text(c);
    if (!back.input_order) continue;
    EXPECT_TRUE(back.input_order->equal(*weight.input_order)) << text(c);
  }
}

TEST(GptqFormat, SymmetricZerosOfTheOtherVersionAreRecognised) {
  for (const int64_t bits : {2, 3, 4, 8}) {
    for (const auto form : {GptqZeros::kPlain, GptqZeros::kLessOne, GptqZeros::kLessOneByWord}) {
      const Linear linear = make_linear({bits, 32, 32, 64, form, /*symmetric=*/true});
      for (const auto label : {GptqZeros::kPlain, GptqZeros::kLessOne, GptqZeros::kLessOneByWord}) {
        const auto weight = unpack_gptq(linear.stored, {bits, 32, label, /*symmetric=*/true}, "layer");
        EXPECT_TRUE(weight.zeros.eq(int64_t{1} << (bits - 1)).all().item<bool>()) << bits;
      }
    }
  }
}

TEST(GptqFormat, TheWordsOfSymmetricZerosAreTheKnownOnes) {
  const auto qzeros = [](int64_t bits, bool plain) {
    const Linear linear = make_linear({bits, 32, 32, 32, GptqZeros::kLessOne, /*symmetric=*/true});
    const auto weight = unpack_gptq(linear.stored, {bits, 32, GptqZeros::kLessOne, true}, "layer");
    return static_cast<uint32_t>(pack_gptq(weight, plain, "layer").qzeros[0][0].item<int32_t>());
  };
  EXPECT_EQ(qzeros(4, false), 0x77777777u);
  EXPECT_EQ(qzeros(4, true), 0x88888888u);
  EXPECT_EQ(qzeros(8, false), 0x7f7f7f7fu);
  EXPECT_EQ(qzeros(8, true), 0x80808080u);
  EXPECT_EQ(qzeros(2, false), 0x55555555u);
  EXPECT_EQ(qzeros(2, true), 0xaaaaaaaau);
}

TEST(GptqFormat, ScalesOfOtherDtypesAreReadWhereTheyAreExact) {
  Linear linear = make_linear({4, 16, 16, 32});
  const auto read = [&] { return unpack_gptq(linear.stored, {4, 16, GptqZeros::kLessOne, false}, "layer").scales; };
  const at::Tensor scales = linear.stored.scales;
  linear.stored.scales = scales.to(at::kFloat);
  EXPECT_TRUE(read().equal(scales));
  linear.stored.scales = scales.to(at::kFloat) + 1e-6;
  EXPECT_ERROR(read(), "layer.scales must be f16, or hold values of f16 only");
}

TEST(GptqFormat, MalformedTensorsAreNamed) {
  const Linear linear = make_linear({4, 16, 24, 40});
  const auto refuse = [&](const auto& change, const std::string& part, GptqLayout layout = {4, 16}) {
    GptqTensors tensors = linear.stored;
    change(tensors);
    EXPECT_ERROR(unpack_gptq(tensors, layout, "layer"), part);
  };
  const auto keep = [](GptqTensors&) {};
  const auto with_group = [](int64_t column, int32_t group) {
    return [=](GptqTensors& t) {
      t.g_idx = t.g_idx->clone();
      t.g_idx->select(0, column).fill_(group);
    };
  };
  refuse(with_group(7, 3), "layer.g_idx must be in 0..2, element 7 is 3");
  refuse(with_group(9, -1), "layer.g_idx must be in 0..2, element 9 is -1");
  refuse(with_group(0, INT32_MAX), "layer.g_idx must be in 0..2, element 0 is 2147483647");
  refuse(with_group(0, 1), "layer.g_idx must give group 0 16 columns, since group_size is 16, got 15");
  refuse([](GptqTensors& t) { t.g_idx = at::zeros({40}, at::kInt); }, "must give group 0 16 columns");
  refuse([](GptqTensors& t) { t.g_idx = at::zeros({39}, at::kInt); }, "layer.g_idx must have shape [40], got [39]");
  refuse([](GptqTensors& t) { t.g_idx = at::zeros({40}, at::kLong); }, "layer.g_idx must be Int, got Long");
  refuse([](GptqTensors& t) { t.qweight = t.qweight.to(at::kLong); }, "layer.qweight must be Int");
  refuse([](GptqTensors& t) { t.qweight = t.qweight[0]; }, "layer.qweight must be Int [K bits / 32, N]");
  refuse([](GptqTensors& t) { t.qweight = t.qweight.slice(1, 0, 23); }, "layer.qweight must have columns that fill");
  refuse([](GptqTensors& t) { t.qzeros = t.qzeros.slice(1, 1); }, "layer.qzeros must have shape [3, 3], got [3, 2]");
  refuse([](GptqTensors& t) { t.qzeros = t.qzeros.to(at::kFloat); }, "layer.qzeros must be Int, got Float");
  refuse([](GptqTensors& t) { t.scales = t.scales.slice(0, 1); }, "layer.scales must have shape [3, 24], got [2, 24]");
  refuse([](GptqTensors& t) { t.scales = t.scales.to(at::kInt); }, "layer.scales must be floating point, got Int");
  refuse([](GptqTensors& t) { t.scales = t.scales * NAN; }, "layer.scales must be finite");
  refuse(keep, "layer.qweight must have columns that fill whole words", {2, 16});
  refuse(keep, "layer.qzeros must have shape", {8, 16});
  refuse(keep, "layer.qweight must be Int [K bits / 32, N] with bits = 3", {3, 16});
  refuse(keep, "layer: bits must be 2, 3, 4 or 8, got 5", {5, 16});
  refuse(keep, "layer: group_size must be -1 or positive, got 0", {4, 0});
  refuse(keep, "layer.qzeros must have shape [1, 3], got [3, 3]", {4, -1});
}

TEST(GptqFormat, WhatTheFormatCannotHoldIsRefused) {
  EXPECT_ERROR(check_gptq_fits("layer", 5, 128, 64, 64), "layer: bits must be 2, 3, 4 or 8 in the gptq format, got 5");
  EXPECT_ERROR(check_gptq_fits("layer", 4, 100, 64, 64), "layer: group_size must be -1 or a power of two");
  EXPECT_ERROR(check_gptq_fits("layer", 4, 32, 65, 64), "layer: outputs must fill whole words of 32 bits");
  EXPECT_ERROR(check_gptq_fits("layer", 4, 32, 64, 68), "layer: inputs must fill whole words of 32 bits");
  EXPECT_ERROR(check_gptq_fits("layer", 3, 32, 64, 40), "got 40 of 3 bits");
  CodedWeight weight = unpack_gptq(make_linear({4, 16, 8, 32}).stored, {4, 16}, "layer");
  weight.bits = 2;
  weight.group_size = 16;
  weight.codes = at::full({16, 32}, 4, at::kByte);
  EXPECT_ERROR(pack_gptq(weight, true, "layer"), "layer: codes must be in 0..3 with 2 bits, got 4");
  weight.codes = at::zeros({16, 32}, at::kByte);
  weight.zeros = at::full({2, 16}, 9, at::kByte);
  EXPECT_ERROR(pack_gptq(weight, true, "layer"), "layer: zeros must be in 0..3 with 2 bits, got 9");
}

}  // namespace
}  // namespace gptq
