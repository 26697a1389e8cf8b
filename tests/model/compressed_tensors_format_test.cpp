#include "model/compressed_tensors_format.h"

#include <cmath>
#include <random>

#include "tests/model/tiny_gpt2.h"
#include "tests/reference_gptq_format.h"

namespace gptq {
namespace {

using test::dequantized;
using test::reference_pack;

using Table = std::vector<std::vector<int64_t>>;

struct Case {
  int64_t bits, group_size, n, k;
  bool symmetric = true;
  bool shuffled = false;
};

// A linear as stored, packed by the reference, and what it stands for.
struct Linear {
  CompressedTensors stored;
  at::Tensor weight;  // f32 [N, K]: (code - zero) · scale
};

Table random_table(int64_t rows, int64_t columns, int64_t bits, uint64_t seed) {
  Table table(static_cast<size_t>(rows));
  for (auto& row : table) row = test::random_ids(columns, int64_t{1} << bits, seed++);
  return table;
}

Linear make_linear(const Case& c) {
  const int64_t groups = group_count(c.k, c.group_size), width = c.group_size == -1 ? c.k : c.group_size;
  const Table codes = random_table(c.k, c.n, c.bits, 3);       // [K][N]
  const Table zeros = random_table(c.n, groups, c.bits, 500);  // [N][n_groups]
  const at::Tensor columns = c.shuffled ? at::randperm(c.k) : at::arange(c.k);
  const at::Tensor g_idx = columns.floor_divide(width).to(at::kInt);
  Linear linear;
  linear.stored.packed = reference_pack(codes, c.bits).t().contiguous();
  linear.stored.scale = at::randn({c.n, groups}).to(at::kHalf);
  linear.stored.shape = at::tensor({c.n, c.k}, at::kLong);
  if (!c.symmetric) linear.stored.zero_point = reference_pack(zeros, c.bits);
  if (c.shuffled) linear.stored.g_idx = g_idx;
  linear.weight = at::empty({c.n, c.k});
  for (int64_t n = 0; n < c.n; ++n) {
    for (int64_t k = 0; k < c.k; ++k) {
      const auto group = g_idx[k].item<int64_t>();
      const int64_t zero =
          c.symmetric ? int64_t{1} << (c.bits - 1) : zeros[static_cast<size_t>(n)][static_cast<size_t>(group)];
      const int64_t code = codes[static_cast<size_t>(k)][static_cast<size_t>(n)];
      linear.weight[n][k] = linear.stored.scale[n][group].to(at::kFloat) * static_cast<double>(code - zero);
    }
  }
  return linear;
}

CodedWeight unpack(const Linear& linear, const Case& c) {
  return unpack_compressed_tensors(linear.stored, {c.bits, c.group_size, c.symmetric}, c.n, c.k, "layer");
}

std::vector<Case> cases() {
  std::vector<Case> result;
  for (int64_t bits = 2; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      result.push_back({bits, 16, 5, 32, symmetric});
      result.push_back({bits, 12, 7, 36, symmetric, true});  // neither rows nor columns fill whole words
      result.push_back({bits, -1, 33, 19, symmetric});
      result.push_back({bits, 11, 3, 11, symmetric, true});
    }
  }
  return result;
}

std::string text(const Case& c) {
  return c10::str("bits ", c.bits, " group_size ", c.group_size, " N ", c.n, " K ", c.k, " symmetric ", c.symmetric,
                  " shuffled ", c.shuffled);
}

TEST(CompressedTensorsFormat, UnpacksWhatTheReferencePacks) {
  for (const Case& c : cases()) {
    const Linear linear = make_linear(c);
    const CodedWeight weight = unpack(linear, c);
    EXPECT_TRUE(dequantized(weight).equal(linear.weight)) << text(c);
    EXPECT_EQ(weight.input_order.has_value(), c.shuffled && c.k > c.group_size) << text(c);
  }
}

TEST(CompressedTensorsFormat, PacksToTheReferencesWords) {
  for (const Case& c : cases()) {
    if (c.shuffled) continue;
    const Linear linear = make_linear(c);
    const CompressedTensors packed = pack_compressed_tensors(unpack(linear, c), c.symmetric, "layer");
    EXPECT_TRUE(packed.packed.equal(linear.stored.packed)) << text(c);
    EXPECT_TRUE(packed.scale.equal(linear.stored.scale)) << text(c);
    EXPECT_TRUE(packed.shape.equal(linear.stored.shape)) << text(c);
    EXPECT_FALSE(packed.g_idx) << text(c);
    ASSERT_EQ(packed.zero_point.has_value(), !c.symmetric) << text(c);
    if (c.symmetric) continue;
    EXPECT_TRUE(packed.zero_point->equal(*linear.stored.zero_point)) << text(c);
  }
}

TEST(CompressedTensorsFormat, OrdersThatLeaveGroupsInPlaceNeedNoGroups) {
  Linear linear = make_linear({4, 16, 8, 32});
  CodedWeight weight = unpack(linear, {4, 16, 8, 32});
  weight.codes = weight.codes.view({8, 2, 16}).flip(2).reshape({8, 32});
  weight.input_order = at::arange(32, at::kInt).view({2, 16}).flip(1).flatten();
  EXPECT_TRUE(pack_compressed_tensors(weight, true, "layer").packed.equal(linear.stored.packed));
  weight.input_order = at::arange(31, -1, -1, at::kInt);
  EXPECT_ERROR(pack_compressed_tensors(weight, true, "layer"), "layer: columns of a group must lie together");
  weight.input_order = at::zeros({32}, at::kInt);
  EXPECT_ERROR(pack_compressed_tensors(weight, true, "layer"), "layer: input_order must be a permutation of 0..31");
}

TEST(CompressedTensorsFormat, OtherDtypesAreReadWhereTheyAreExact) {
  const Case c = {4, 16, 16, 32};
  Linear linear = make_linear(c);
  const at::Tensor scale = linear.stored.scale.to(at::kBFloat16);
  for (const auto dtype : {at::kBFloat16, at::kFloat}) {
    linear.stored.scale = scale.to(dtype);
    linear.stored.shape = linear.stored.shape.to(at::kInt);
    EXPECT_TRUE(unpack(linear, c).scales.equal(scale.to(at::kHalf).t()));
  }
  linear.stored.scale = scale.to(at::kFloat) * 1.0001;
  EXPECT_ERROR(unpack(linear, c), "layer.weight_scale must be f16, or hold values of f16 only, got Float");
  linear.stored.scale = scale * 1e30;
  EXPECT_ERROR(unpack(linear, c), "layer.weight_scale must be f16, or hold values of f16 only, got BFloat16");
}

TEST(CompressedTensorsFormat, MalformedTensorsAreNamed) {
  const Case c = {4, 16, 24, 48, /*symmetric=*/false, /*shuffled=*/true};
  const Linear linear = make_linear(c);
  const auto refuse = [&](const auto& change, const std::string& part,
                          CompressedTensorsLayout layout = {4, 16, false}) {
    CompressedTensors tensors = linear.stored;
    change(tensors);
    EXPECT_ERROR(unpack_compressed_tensors(tensors, layout, c.n, c.k, "layer"), part);
  };
  const auto keep = [](CompressedTensors&) {};
  const auto with_group = [](int64_t column, int32_t group) {
    return [=](CompressedTensors& t) {
      t.g_idx = t.g_idx->clone();
      t.g_idx->select(0, column).fill_(group);
    };
  };
  refuse(with_group(7, 3), "layer.weight_g_idx must be in 0..2, element 7 is 3");
  refuse(with_group(9, -1), "layer.weight_g_idx must be in 0..2, element 9 is -1");
  refuse([](auto& t) { t.g_idx = at::zeros({48}, at::kInt); }, "layer.weight_g_idx must give group 0 16 columns");
  refuse([](auto& t) { t.g_idx = at::zeros({47}, at::kInt); }, "layer.weight_g_idx must have shape [48], got [47]");
  refuse([](auto& t) { t.g_idx = t.g_idx->to(at::kLong); }, "layer.weight_g_idx must be Int, got Long");
  refuse([](auto& t) { t.packed = t.packed.to(at::kLong); }, "layer.weight_packed must be Int, got Long");
  refuse([](auto& t) { t.packed = t.packed.slice(1, 1); }, "layer.weight_packed must have shape [24, 6], got [24, 5]");
  refuse([](auto& t) { t.packed = t.packed.t(); }, "layer.weight_packed must have shape [24, 6], got [6, 24]");
  refuse([](auto& t) { t.scale = t.scale.t(); }, "layer.weight_scale must have shape [24, 3], got [3, 24]");
  refuse([](auto& t) { t.scale = t.scale.to(at::kInt); }, "layer.weight_scale must be floating point, got Int");
  refuse([](auto& t) { t.scale = t.scale * NAN; }, "layer.weight_scale must be finite");
  refuse([](auto& t) { t.zero_point = t.zero_point->slice(0, 1); },
         "layer.weight_zero_point must have shape [3, 3], got [2, 3]");
  refuse([](auto& t) { t.zero_point = t.zero_point->to(at::kChar); }, "layer.weight_zero_point must be Int, got Char");
  refuse([](auto& t) { t.zero_point.reset(); }, "layer.weight_zero_point must be there in an asymmetric group");
  refuse([](auto& t) { t.shape = t.shape.flip(0); }, "layer.weight_shape must be [N, K] = [24, 48], got [48, 24]");
  refuse([](auto& t) { t.shape = at::tensor({24, 48, 1}); }, "layer.weight_shape must have shape [2], got [3]");
  refuse([](auto& t) { t.shape = t.shape.to(at::kFloat); }, "layer.weight_shape must be Long or Int, got Float");
  refuse(keep, "layer.weight_packed must have shape [24, 12], got [24, 6]", {8, 16, false});
  refuse(keep, "layer.weight_zero_point must not be there in a symmetric group", {4, 16, true});
  refuse(keep, "layer.weight_scale must have shape [24, 1], got [24, 3]", {4, -1, false});
  refuse(keep, "layer: bits must be 2 to 8 in the compressed-tensors format, got 9", {9, 16, false});
  refuse(keep, "layer: group_size must be -1 or divide the 48 inputs in the compressed-tensors format, got 20",
         {4, 20, false});
  refuse(keep, "layer: group_size must be -1 or divide the 48 inputs", {4, 0, false});
}

TEST(CompressedTensorsFormat, WhatTheFormatCannotHoldIsRefused) {
  CodedWeight weight = unpack(make_linear({4, 16, 8, 32}), {4, 16, 8, 32});
  weight.bits = 2;
  EXPECT_ERROR(pack_compressed_tensors(weight, false, "layer"), "layer: codes must be in 0..3 with 2 bits, got 15");
  weight.bits = 4;
  weight.zeros = at::full_like(weight.zeros, 7);
  EXPECT_ERROR(pack_compressed_tensors(weight, true, "layer"), "layer: zeros must be 8 to be left out");
  weight.group_size = 24;
  EXPECT_ERROR(pack_compressed_tensors(weight, false, "layer"), "group_size must be -1 or divide the 32 inputs");
}

// One element of a tensor is another, or the tensor has another shape or dtype.
at::Tensor mutated(const at::Tensor& tensor, std::mt19937_64& random) {
  constexpr std::array kDtypes = {at::kByte, at::kChar, at::kInt, at::kLong, at::kHalf, at::kFloat, at::kBool};
  switch (random() % 4) {
    case 0: {
      at::Tensor result = tensor.clone();
      auto* bytes = static_cast<uint8_t*>(result.data_ptr());
      if (result.nbytes() > 0) bytes[random() % result.nbytes()] ^= static_cast<uint8_t>(1 << random() % 8);
      return result;
    }
    case 1: {
      const auto dimension = static_cast<int64_t>(random() % static_cast<uint64_t>(tensor.dim()));
      return tensor.narrow(dimension, 0,
                           static_cast<int64_t>(random() % static_cast<uint64_t>(tensor.size(dimension))));
    }
    case 2:
      return tensor.unsqueeze(static_cast<int64_t>(random() % 2)).transpose(0, 1);
    default:
      return tensor.to(kDtypes[random() % kDtypes.size()]);
  }
}

TEST(CompressedTensorsFormat, WhateverIsStoredIsAWeightOrAnError) {
  std::mt19937_64 random(0);  // NOLINT(cert-msc51-cpp)
  int64_t refused = 0, read = 0;
  for (int round = 0; round < 300; ++round) {
    const Case c = {3 + round % 3, 8, 9, 24, round % 2 == 0, round % 3 == 0};
    Linear linear = make_linear({c.bits, c.group_size, c.n, c.k, c.symmetric, c.shuffled});
    CompressedTensors& stored = linear.stored;
    std::vector<at::Tensor*> tensors = {&stored.packed, &stored.scale, &stored.shape};
    if (stored.zero_point) tensors.push_back(&*stored.zero_point);
    if (stored.g_idx) tensors.push_back(&*stored.g_idx);
    at::Tensor& chosen = *tensors[random() % tensors.size()];
    chosen = mutated(chosen, random);
    try {
      const CodedWeight weight = unpack(linear, c);
      ++read;
      EXPECT_EQ(weight.codes.sizes(), at::IntArrayRef({c.n, c.k}));
      EXPECT_LT(weight.codes.max().item<int64_t>(), int64_t{1} << c.bits);
      EXPECT_LT(weight.zeros.max().item<int64_t>(), int64_t{1} << c.bits);
      EXPECT_TRUE(weight.scales.isfinite().all().item<bool>());
      const at::Tensor columns = at::arange(c.k, at::kInt);
      EXPECT_TRUE(std::get<0>(weight.input_order.value_or(columns).sort()).equal(columns));
    } catch (const c10::Error& error) {
      ++refused;
      EXPECT_EQ(std::string(error.what_without_backtrace()).find("layer"), 0u) << error.what_without_backtrace();
    }
  }
  EXPECT_GT(refused, 50);
  EXPECT_GT(read, 25);
}

}  // namespace
}  // namespace gptq
