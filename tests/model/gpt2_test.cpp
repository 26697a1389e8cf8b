#include "model/gpt2.h"

#include <gptq/pack_w4.h>

#include "model/checkpoint.h"
#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

using test::TempFolder;
using test::Tensors;
using test::tiny_config;
using test::tiny_tensors;

torch::jit::Module build(const TempFolder& folder) {
  return build_gpt2(GPT2Config::read(folder.path("config.json")), TensorStore::open(folder.path()));
}

torch::jit::Module build(const Json& config, const Tensors& tensors) {
  const TempFolder folder;
  test::write_model(folder, config, tensors);
  return build(folder);
}

at::Tensor ids(int64_t count, uint64_t seed = 1) {
  return at::tensor(test::random_ids(count, 53, seed), at::kLong).unsqueeze(0);
}

at::Tensor logits(torch::jit::Module& module, const at::Tensor& input) {
  return module.forward({input}).toTupleRef().elements()[0].toTensor();
}

// GPT-2 written out in float64, for one sequence [T]: the definition, apart from the code under test.
at::Tensor reference_logits(const Json& config, Tensors tensors, const at::Tensor& input) {
  for (auto& [name, tensor] : tensors) tensor = tensor.to(at::kDouble);
  const int64_t length = input.size(0);
  const int64_t width = config["n_embd"];
  const int64_t heads = config["n_head"];
  const int64_t size = width / heads;
  const auto norm = [&](const at::Tensor& x, const std::string& name) {
    const at::Tensor centred = x - x.mean(1, true);
    const at::Tensor deviation = (centred.square().mean(1, true) + 1e-5).sqrt();
    return centred / deviation * tensors[name + ".weight"] + tensors[name + ".bias"];
  };
  const auto linear = [&](const at::Tensor& x, const std::string& name) {
    return x.mm(tensors[name + ".weight"]) + tensors[name + ".bias"];
  };
  const at::Tensor future = at::ones({length, length}, at::kBool).triu(1);
  at::Tensor x =
      tensors["transformer.wte.weight"].index({input}) + tensors["transformer.wpe.weight"].slice(0, 0, length);
  for (int64_t layer = 0; layer < config["n_layer"]; ++layer) {
    const std::string block = "transformer.h." + std::to_string(layer) + ".";
    const at::Tensor qkv = linear(norm(x, block + "ln_1"), block + "attn.c_attn");
    std::vector<at::Tensor> outputs;
    for (int64_t head = 0; head < heads; ++head) {
      const auto part = [&](int64_t which) { return qkv.narrow(1, which * width + head * size, size); };
      const at::Tensor scores = part(0).mm(part(1).t()) / std::sqrt(static_cast<double>(size));
      outputs.push_back(scores.masked_fill(future, -INFINITY).softmax(1).mm(part(2)));
    }
    x = x + linear(at::cat(outputs, 1), block + "attn.c_proj");
    const at::Tensor h = linear(norm(x, block + "ln_2"), block + "mlp.c_fc");
    const at::Tensor activated = 0.5 * h * (1 + at::tanh(std::sqrt(2 / M_PI) * (h + 0.044715 * h.pow(3))));
    x = x + linear(activated, block + "mlp.c_proj");
  }
  const auto head = tensors.find("lm_head.weight");
  return norm(x, "transformer.ln_f").mm((head == tensors.end() ? tensors["transformer.wte.weight"] : head->second).t());
}

// Every one of the nine linears on the longest path rounds each output by at most K u |x||w|, K <= 96, u = 2^-24; the
// layer norms scale such an error by the order of 1. 9 * 96 * 2^-24 = 5e-5 of the largest logit.
void expect_close(const at::Tensor& got, const at::Tensor& expected) {
  const double scale = expected.abs().max().item<double>();
  EXPECT_LE((got.to(at::kDouble) - expected).abs().max().item<double>(), 5e-5 * scale);
}

TEST(GPT2, MatchesTheDefinition) {
  const auto tensors = tiny_tensors(tiny_config());
  auto module = build(tiny_config(), tensors);
  for (const int64_t length : {1, 2, 17, 41}) {
    expect_close(logits(module, ids(length))[0], reference_logits(tiny_config(), tensors, ids(length)[0]));
  }
}

TEST(GPT2, SequencesOfABatchAreIndependent) {
  auto module = build(tiny_config(), tiny_tensors(tiny_config()));
  const at::Tensor both = logits(module, at::cat({ids(11, 1), ids(11, 2)}));
  expect_close(both[0], logits(module, ids(11, 1))[0].to(at::kDouble));
  expect_close(both[1], logits(module, ids(11, 2))[0].to(at::kDouble));
}

TEST(GPT2, CacheGivesWhatAllTokensAtOnceGive) {
  auto module = build(tiny_config(), tiny_tensors(tiny_config()));
  const at::Tensor input = ids(23);
  const at::Tensor expected = logits(module, input).to(at::kDouble);
  c10::IValue past;
  int64_t begin = 0;
  for (const int64_t length : {7, 1, 1, 5, 9}) {
    const auto output = module.forward({input.narrow(1, begin, length), past});
    expect_close(output.toTupleRef().elements()[0].toTensor(), expected.narrow(1, begin, length));
    past = output.toTupleRef().elements()[1];
    begin += length;
    EXPECT_EQ(past.toTensorVector().size(), 4u);
    EXPECT_EQ(past.toTensorVector()[0].sizes(), (std::vector<int64_t>{1, 3, begin, 8}));
  }
}

TEST(GPT2, HeadIsTiedUnlessTheCheckpointHasItsOwn) {
  auto tensors = tiny_tensors(tiny_config());
  Json untied = tiny_config();
  untied["tie_word_embeddings"] = false;
  const auto weight = [](const torch::jit::Module& module, const std::string& part) {
    return part == "head" ? module.attr("lm_head").toModule().attr("weight").toTensor()
                          : module.attr("transformer").toModule().attr("wte").toModule().attr("weight").toTensor();
  };
  const auto tied = build(tiny_config(), tensors);
  EXPECT_TRUE(weight(tied, "head").is_same(weight(tied, "embedding")));
  EXPECT_ERROR(build(untied, tensors), "tensor \"lm_head.weight\" of shape [53, 24] is missing");
  tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone();
  const auto copied = build(tiny_config(), tensors);
  EXPECT_TRUE(weight(copied, "head").is_same(weight(copied, "embedding")));
  tensors["lm_head.weight"] = at::randn({53, 24});
  auto own = build(untied, tensors);
  expect_close(logits(own, ids(9))[0], reference_logits(untied, tensors, ids(9)[0]));
}

TEST(GPT2, NamesWithoutPrefixAndOldBuffersAreAccepted) {
  const auto tensors = tiny_tensors(tiny_config());
  Tensors bare;
  for (const auto& [name, tensor] : tensors) bare[name.substr(std::string("transformer.").size())] = tensor;
  bare["h.0.attn.bias"] = at::ones({1, 1, 41, 41}, at::kByte);
  bare["h.0.attn.masked_bias"] = at::tensor(-1e4f);
  auto module = build(tiny_config(), bare);
  auto expected = build(tiny_config(), tensors);
  EXPECT_TRUE(at::equal(logits(module, ids(5)), logits(expected, ids(5))));
}

TEST(GPT2, HalfPrecisionWeightsComputeInFloat32) {
  for (const auto dtype : {at::kHalf, at::kBFloat16, at::kDouble}) {
    auto tensors = tiny_tensors(tiny_config());
    for (auto& [name, tensor] : tensors) tensor = tensor.to(dtype);
    auto module = build(tiny_config(), tensors);
    EXPECT_EQ(logits(module, ids(5)).scalar_type(), at::kFloat);
    expect_close(logits(module, ids(5))[0], reference_logits(tiny_config(), tensors, ids(5)[0]));
  }
}

TEST(GPT2, TensorsThatDoNotFitTheConfigAreNamed) {
  const std::string name = "transformer.h.1.mlp.c_fc.weight";
  const auto good = tiny_tensors(tiny_config());
  const auto changed = [&](const std::string& which, const std::optional<at::Tensor>& tensor) {
    auto tensors = good;
    tensors.erase(which);
    if (tensor) tensors[which] = *tensor;
    return build(tiny_config(), tensors);
  };
  EXPECT_ERROR(changed(name, std::nullopt), "tensor \"" + name + "\" of shape [24, 37] is missing");
  EXPECT_ERROR(changed(name, at::ones({37, 24})), "tensor \"" + name + "\" must have shape [24, 37]");
  EXPECT_ERROR(changed(name, at::ones({37, 24})), "got [37, 24]");
  EXPECT_ERROR(changed(name, at::ones({24, 37}, at::kInt)), "must be floating point, got int");
  EXPECT_ERROR(changed("transformer.h.2.ln_1.weight", at::ones({24})), "is not part of the model");
  EXPECT_ERROR(changed("score.weight", at::ones({24})), "is not part of the model");
  EXPECT_ERROR(changed("h.0.ln_1.bias", at::ones({24})), "is there twice");
  for (const float value : {NAN, INFINITY, -INFINITY}) {
    at::Tensor weight = good.at(name).clone();
    weight.index_put_({at::tensor(1), at::tensor(2)}, value);
    EXPECT_ERROR(changed(name, weight), "must be finite, element 39 is ");
  }
}

// A tiny GPT-2 with one linear packed: codes at random, and the same linear dequantized.
struct PackedModel {
  Json config = tiny_config();
  Tensors tensors = tiny_tensors(config);
  Tensors dequantized = tensors;
};

PackedModel pack_one(const std::string& path, int64_t k, int64_t n, int64_t group_size, bool with_zeros) {
  PackedModel model;
  const int64_t groups = group_size == -1 ? 1 : (k + group_size - 1) / group_size;
  const at::Tensor packed = pack_w4(at::randint(16, {n, k}, at::kByte));
  const at::Tensor scales = (at::rand({groups, n}) * 0.05 + 0.01).to(at::kHalf);
  std::optional<at::Tensor> zeros;
  if (with_zeros) zeros = at::randint(16, {groups, n}, at::kByte);
  model.tensors.erase(path + ".weight");
  model.tensors[path + ".packed"] = packed;
  model.tensors[path + ".scales"] = scales;
  if (zeros) model.tensors[path + ".zeros"] = *zeros;
  const at::Tensor weight = dequantize_w4(packed, scales, zeros, k, group_size);
  const bool conv1d = path != "lm_head";
  model.dequantized[path + ".weight"] = conv1d ? weight.t().contiguous() : weight;
  model.config["quantization_config"] = {{"quant_method", "libgptq"},
                                         {"format", "w4"},
                                         {"version", 1},
                                         {"modules", {{path, {{"group_size", group_size}}}}}};
  return model;
}

TEST(GPT2, PackedLinearsComputeWhatTheDequantizedOnesDo) {
  for (const auto& [group_size, with_zeros] : {std::pair(16, false), {-1, true}, {8, true}, {128, false}}) {
    const auto model = pack_one("transformer.h.1.mlp.c_proj", 37, 24, group_size, with_zeros);
    auto module = build(model.config, model.tensors);
    expect_close(logits(module, ids(13))[0], reference_logits(tiny_config(), model.dequantized, ids(13)[0]));
  }
  const auto model = pack_one("lm_head", 24, 53, 16, true);
  auto module = build(model.config, model.tensors);
  expect_close(logits(module, ids(13))[0], reference_logits(tiny_config(), model.dequantized, ids(13)[0]));
}

TEST(GPT2, PackedTensorsThatDoNotFitAreNamed) {
  const std::string path = "transformer.h.1.mlp.c_proj";
  const auto good = pack_one(path, 37, 24, 16, true);
  const auto changed = [&](const std::string& leaf, const at::Tensor& tensor) {
    auto tensors = good.tensors;
    tensors[path + leaf] = tensor;
    return build(good.config, tensors);
  };
  EXPECT_ERROR(changed(".scales", at::ones({2, 24}, at::kHalf)), ".scales\" must have shape [3, 24]");
  EXPECT_ERROR(changed(".scales", at::ones({3, 24})), ".scales\" must be Half, got Float");
  EXPECT_ERROR(changed(".scales", at::full({3, 24}, NAN, at::kHalf)), "must be finite");
  EXPECT_ERROR(changed(".packed", at::ones({2, 5, 63}, at::kByte)), ".packed\" must have shape [2, 5, 64]");
  EXPECT_ERROR(changed(".zeros", at::ones({24, 3}, at::kByte)), ".zeros\" must have shape [3, 24]");
  EXPECT_ERROR(changed(".weight", at::ones({37, 24})), ".weight\" is not part of the model");
  Json config = good.config;
  config["quantization_config"]["modules"][path]["bits"] = 8;
  EXPECT_ERROR(build(config, good.tensors), ".packed\" must have shape [2, 5, 128]");
  EXPECT_ERROR(build(tiny_config(), good.tensors), "quantization_config must be there");
  config["quantization_config"] = {{"quant_method", "gptq"}, {"bits", 4}};
  EXPECT_ERROR(build(config, good.tensors), "quant_method must be \"libgptq\", since");
}

}  // namespace
}  // namespace gptq
