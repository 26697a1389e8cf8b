// Arguments spoiled at random: gptq::linear_w4 and linear_w8 either compute the right answer or throw c10::Error. Run
// with AddressSanitizer by `scripts/test.sh --sanitize`.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <string>

#include "gptq/linear_w4.h"
#include "tests/reference_w4.h"

namespace gptq {
namespace {

struct Arguments {
  at::Tensor input, packed, scales;
  std::optional<at::Tensor> zeros, bias, input_order;
  int64_t group_size;
  int bits;
  std::string compute = "exact";

  at::Tensor run() const {
    return (bits == 8 ? linear_w8 : linear_w4)(input, packed, scales, zeros, bias, input_order, group_size, compute);
  }
};

class Fuzzer {
 public:
  explicit Fuzzer(uint64_t seed) : random_(seed) {}

  // Valid arguments, and the weight that they stand for.
  std::pair<Arguments, reference::W4Weight> draw() {
    const int64_t n = number(0, 40), k = number(0, 300);
    const int64_t group_size = pick<int64_t>({-1, 1, 7, 32, 128, 300, std::numeric_limits<int64_t>::max()});
    const auto weight = reference::random_w4_weight(n, k, group_size, flip(), random_(), flip() ? 4 : 8);
    Arguments arguments{
        at::randn({number(0, 6), k}), weight.packed, weight.scales, weight.zeros, {}, {}, group_size, weight.bits};
    if (flip()) arguments.bias = at::randn({n});
    if (flip()) arguments.input_order = at::randperm(k).to(at::kInt);
    arguments.compute = pick<const char*>({"exact", "bf16", "int8"});
    return {arguments, weight};
  }

  // The same values, laid out otherwise.
  void lay_out_otherwise(Arguments& arguments) {
    for (at::Tensor* tensor : tensors(arguments)) {
      switch (number(0, 4)) {
        case 0:  // an offset that aligns nothing
          *tensor = at::cat({at::zeros({number(1, 3)}, tensor->options()), tensor->flatten()})
                        .slice(0, -tensor->numel(), std::numeric_limits<int64_t>::max())
                        .slice(0, 0, tensor->numel())
                        .view(tensor->sizes());
          break;
        case 1:  // every second element
          *tensor = at::stack({*tensor, *tensor}, -1).select(-1, 1);
          break;
        case 2:  // the dimensions in another order in memory
          *tensor = tensor->transpose(0, -1).contiguous().transpose(0, -1);
          break;
        default:
          break;
      }
    }
    if (number(0, 3) == 0) arguments.input = arguments.input.unsqueeze(0).expand({2, -1, -1});
  }

  // Anything may come out of this but a crash.
  void spoil(Arguments& arguments) {
    const auto chosen = tensors(arguments);
    at::Tensor& tensor = *chosen[static_cast<size_t>(number(0, static_cast<int64_t>(chosen.size()) - 1))];
    switch (number(0, 8)) {
      case 0:
        tensor = tensor.to(pick<at::ScalarType>({at::kFloat, at::kDouble, at::kInt, at::kLong, at::kByte, at::kChar,
                                                 at::kHalf, at::kBFloat16, at::kBool, at::kComplexFloat}));
        break;
      case 1:
        tensor = tensor.unsqueeze(number(0, tensor.dim()));
        break;
      case 2:
        if (tensor.dim() > 0 && tensor.size(0) > 0) tensor = tensor.select(0, 0);
        break;
      case 3:
        if (tensor.dim() > 0) {
          const int64_t dimension = number(0, tensor.dim() - 1);
          tensor = tensor.slice(dimension, 0, number(0, tensor.size(dimension)));
        }
        break;
      case 4:
        tensor = at::cat({tensor, tensor}, 0);
        break;
      case 5:
        tensor = tensor.to(at::kMeta);
        break;
      case 6:
        tensor = at::Tensor();
        break;
      case 7:
        arguments.group_size = pick<int64_t>({-2, 0, 1, 8, 64, int64_t{1} << 31, std::numeric_limits<int64_t>::max(),
                                              std::numeric_limits<int64_t>::min()});
        break;
      default:
        spoil_values(arguments);
        break;
    }
  }

 private:
  void spoil_values(Arguments& arguments) {
    arguments.compute = pick<const char*>({"exact", "", "int4", "EXACT", "bf16"});
    if (arguments.input_order && arguments.input_order->defined() && arguments.input_order->numel() > 0 &&
        arguments.input_order->scalar_type() == at::kInt && !arguments.input_order->is_meta()) {
      arguments.input_order = arguments.input_order->clone();
      arguments.input_order->view(-1)[0] =
          pick<int64_t>({-1, 1 << 20, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()});
    }
  }

  static std::vector<at::Tensor*> tensors(Arguments& arguments) {
    std::vector<at::Tensor*> result;
    for (at::Tensor* tensor : {&arguments.input, &arguments.packed, &arguments.scales})
      if (tensor->defined()) result.push_back(tensor);
    for (auto* tensor : {&arguments.zeros, &arguments.bias, &arguments.input_order})
      if (tensor->has_value() && (*tensor)->defined()) result.push_back(&**tensor);
    return result;
  }

  int64_t number(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(random_); }
  bool flip() { return number(0, 1) == 1; }
  template <typename T>
  T pick(const std::vector<T>& choices) {
    return choices[static_cast<size_t>(number(0, static_cast<int64_t>(choices.size()) - 1))];
  }

  std::mt19937_64 random_;
};

TEST(LinearW4Fuzz, LayoutsDoNotMatter) {
  Fuzzer fuzzer(1);
  for (int round = 0; round < 1000; ++round) {
    const auto [plain, weight] = fuzzer.draw();
    Arguments other = plain;
    fuzzer.lay_out_otherwise(other);
    const at::Tensor expected =
        plain.run().expand(other.input.dim() == 3 ? at::IntArrayRef({2, -1, -1}) : at::IntArrayRef({-1, -1}));
    ASSERT_TRUE(at::equal(other.run(), expected)) << "round " << round;
    if (plain.compute == "exact" && expected.numel() > 0) {
      const at::Tensor x = plain.input_order ? plain.input.index_select(1, *plain.input_order) : plain.input;
      const at::Tensor error = plain.run() - reference::linear_w4(x, weight, plain.bias);
      // 300 terms below 5 · 0.1 · 15, each rounded to 24 bits in its turn: far above what linear_w4_test.cpp allows.
      ASSERT_LE(error.abs().max().item<double>(), 300 * 7.5 * 0x1p-22) << "round " << round;
    }
  }
}

TEST(LinearW4Fuzz, SpoiledArgumentsAreRefusedOrRight) {
  Fuzzer fuzzer(2);
  int refused = 0;
  constexpr int kRounds = 4000;
  for (int round = 0; round < kRounds; ++round) {
    Arguments arguments = fuzzer.draw().first;
    fuzzer.lay_out_otherwise(arguments);
    fuzzer.spoil(arguments);
    try {
      const at::Tensor y = arguments.run();
      ASSERT_EQ(y.size(-1), arguments.scales.size(1)) << "round " << round;
      ASSERT_EQ(y.scalar_type(), arguments.input.scalar_type()) << "round " << round;
    } catch (const c10::Error& error) {
      ASSERT_NE(std::string(error.what_without_backtrace()), "") << "round " << round;
      ++refused;
    }
  }
  EXPECT_GT(refused, kRounds / 3);
  EXPECT_LT(refused, kRounds);
}

// Sizes whose products leave 32 or 64 bits, without the memory that they would take.
TEST(LinearW4Fuzz, HugeSizes) {
  const int64_t huge = (int64_t{1} << 31) + 3;
  const at::Tensor packed = at::zeros({0, 1, 64}, at::kByte), scales = at::zeros({1, 0}, at::kHalf);
  const at::Tensor rows = at::zeros({1, 8}).expand({huge, 8});
  EXPECT_EQ(linear_w4(rows, packed, scales, {}, {}, {}, 8).sizes(), at::IntArrayRef({huge, 0}));
  const at::Tensor empty = at::zeros({0, huge, 8});
  EXPECT_EQ(linear_w4(empty, packed, scales, {}, {}, {}, 8).sizes(), at::IntArrayRef({0, huge, 0}));
  const at::Tensor meta = at::empty({huge, 8}, at::device(at::kMeta));
  const at::Tensor wide = at::empty({huge / 16 + 1, 1, 64}, at::device(at::kMeta).dtype(at::kByte));
  const at::Tensor many = at::empty({1, huge}, at::device(at::kMeta).dtype(at::kHalf));
  EXPECT_EQ(linear_w4(meta.slice(0, 0, 4), wide, many, {}, {}, {}, -1).sizes(), at::IntArrayRef({4, huge}));
  for (const int64_t group_size : {huge, std::numeric_limits<int64_t>::max()})
    EXPECT_EQ(linear_w4(at::ones({2, 8}), at::zeros({1, 1, 64}, at::kByte), at::ones({1, 5}, at::kHalf), {}, {}, {},
                        group_size)
                  .sizes(),
              at::IntArrayRef({2, 5}));
}

}  // namespace
}  // namespace gptq
