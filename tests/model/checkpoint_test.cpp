#include "model/checkpoint.h"

#include <gptq/pack_w4.h>

#include "model/perplexity.h"
#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

using test::TempFolder;
using test::tiny_config;
using test::tiny_tensors;

double perplexity(torch::jit::Module& module) {
  return evaluate(module, test::random_ids(100, 53), {.window = 40}).perplexity;
}

double perplexity(const std::string& path) {
  auto model = load_model(path);
  return perplexity(model.module);
}

TEST(Checkpoint, LoadsFoldersAndTorchScriptFiles) {
  const TempFolder folder;
  test::write_tiny_gpt2(folder);
  auto model = load_model(folder.path());
  EXPECT_EQ(model.kind, ModelKind::kHuggingFace);
  EXPECT_EQ(model.context_length, 41);
  save_torchscript(model.module, folder.path("model.pt"));
  auto script = load_model(folder.path("model.pt"));
  EXPECT_EQ(script.kind, ModelKind::kTorchScript);
  EXPECT_FALSE(script.context_length);
  EXPECT_EQ(perplexity(script.module), perplexity(model.module));
}

TEST(Checkpoint, WhatIsNoModelIsRefusedInOneLine) {
  const TempFolder folder;
  const auto refuse = [&](const std::string& name, const std::string& part) {
    EXPECT_ERROR(load_model(folder.path(name)), part);
    const std::string error = test::error_of([&] { load_model(folder.path(name)); });
    EXPECT_NE(error, test::kNoError);
    EXPECT_EQ(error.find('\n'), std::string::npos) << error;
  };
  refuse("none", "no such model folder or file");
  refuse("", "must hold config.json");
  folder.write("garbage", std::string(1000, 'x'));
  refuse("garbage", "must be a Hugging Face folder, a TorchScript file or an AOTInductor package, is none");
  folder.write("empty", "");
  refuse("empty", "must be a Hugging Face folder, a TorchScript file or an AOTInductor package, is none");
  folder.write("zip", "PK\3\4" + std::string(1000, 'x'));
  refuse("zip", "not a TorchScript file");
  folder.write("config.json", tiny_config().dump());
  refuse("", "must hold model.safetensors");
}

TEST(Checkpoint, UnchangedModelComesBackToTheBit) {
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const TempFolder folder;
    auto tensors = tiny_tensors(tiny_config());
    for (auto& [name, tensor] : tensors) tensor = tensor.to(dtype);
    std::filesystem::create_directory(folder.path("in"));
    folder.write("in/config.json", tiny_config().dump());
    save_safetensors(folder.path("in/model.safetensors"), {tensors.begin(), tensors.end()});
    save_checkpoint(folder.path("in"), folder.path("out"), {}, {});
    const auto store = TensorStore::open(folder.path("out"));
    for (const auto& [name, tensor] : tensors) EXPECT_TRUE(store.tensor(name).equal(tensor)) << name;
    EXPECT_EQ(read_json_object(folder.path("out/config.json")), tiny_config());
    EXPECT_EQ(perplexity(folder.path("out")), perplexity(folder.path("in")));
  }
}

class SaveQuantized : public ::testing::Test {
 protected:
  SaveQuantized() {
    std::filesystem::create_directory(in_());
    folder_.write("in/config.json", tiny_config().dump());
    const auto tensors = tiny_tensors(tiny_config());
    save_safetensors(folder_.path("in/model.safetensors"), {tensors.begin(), tensors.end()});
    folder_.write("in/vocab.json", "{}");
    folder_.write("in/generation_config.json", "{\"a\": 1}");
    folder_.write("in/pytorch_model.bin", "not copied");
  }
  std::string in_() const { return folder_.path("in"); }
  std::string out_() const { return folder_.path("out"); }

  static QuantizedTensors packed(int64_t k, int64_t n) {
    QuantizedTensors result;
    result.group_size = 16;
    result.packed = pack_w4(at::randint(16, {n, k}, at::kByte));
    result.scales = at::full({(k + 15) / 16, n}, 0.03, at::kHalf);
    return result;
  }

  const std::string path_ = "transformer.h.0.attn.c_attn";
  TempFolder folder_;
};

TEST_F(SaveQuantized, WritesTensorsSettingsAndTokenizer) {
  const auto quantized = packed(24, 72);
  QuantizedTensors shifted = packed(24, 24);
  shifted.bits = 3;
  shifted.bias = at::rand({24});
  save_checkpoint(in_(), out_(), {{path_, quantized}, {"transformer.h.1.attn.c_proj", shifted}},
                  {{"sym", true}, {"damping", 0.01}, {"version", 99}});
  EXPECT_EQ(folder_.count(), 2);
  EXPECT_EQ(folder_.read("out/vocab.json"), "{}");
  EXPECT_EQ(folder_.read("out/generation_config.json"), "{\"a\": 1}");
  EXPECT_FALSE(std::filesystem::exists(folder_.path("out/pytorch_model.bin")));
  const Json config = read_json_object(folder_.path("out/config.json"));
  const Json entry = config["quantization_config"];
  EXPECT_EQ(entry["version"], 1);
  EXPECT_EQ(entry["damping"], 0.01);
  EXPECT_EQ(entry["modules"][path_], (Json{{"bits", 4}, {"group_size", 16}}));
  EXPECT_EQ(entry["modules"]["transformer.h.1.attn.c_proj"]["bits"], 3);
  const auto store = TensorStore::open(out_());
  EXPECT_FALSE(store.contains(path_ + ".weight"));
  EXPECT_FALSE(store.contains(path_ + ".zeros"));
  EXPECT_TRUE(store.tensor(path_ + ".packed").equal(quantized.packed));
  EXPECT_TRUE(store.tensor(path_ + ".scales").equal(quantized.scales));
  EXPECT_TRUE(store.tensor(path_ + ".bias").equal(tiny_tensors(tiny_config())[path_ + ".bias"]));
  EXPECT_TRUE(store.tensor("transformer.h.1.attn.c_proj.bias").equal(*shifted.bias));
}

TEST_F(SaveQuantized, ReloadsToTheBitAndCanBeQuantizedFurther) {
  save_checkpoint(in_(), out_(), {{path_, packed(24, 72)}}, {});
  auto first = load_model(out_());
  save_torchscript(first.module, folder_.path("model.pt"));
  EXPECT_EQ(perplexity(folder_.path("model.pt")), perplexity(out_()));
  QuantizedTensors wide = packed(24, 37);
  wide.group_size = -1;
  wide.scales = wide.scales.narrow(0, 0, 1);
  save_checkpoint(out_(), folder_.path("out2"), {{"transformer.h.1.mlp.c_fc", wide}}, {});
  const auto second = load_model(folder_.path("out2"));
  EXPECT_EQ(second.config->quantization->of(path_).group_size, 16);
  EXPECT_EQ(second.config->quantization->of("transformer.h.1.mlp.c_fc").group_size, -1);
}

// A random weight as numbers; its columns in an order if the groups' order is to be another.
CodedWeight coded(int64_t n, int64_t k, int64_t bits, bool reordered) {
  CodedWeight weight;
  weight.bits = bits;
  weight.group_size = reordered ? 16 : -1;
  const int64_t groups = group_count(k, weight.group_size);
  weight.codes = at::randint(1 << bits, {n, k}, at::kByte);
  weight.scales = (at::rand({groups, n}) * 0.02 + 0.01).to(at::kHalf);
  weight.zeros = at::full({groups, n}, 1 << (bits - 1), at::kByte);
  // The last columns in the first group, and within it not in the order of columns.
  if (reordered) weight.input_order = at::arange(k - 1, -1, -1, at::kInt).view({-1, 8}).flip(1).flatten();
  return weight;
}

TEST_F(SaveQuantized, TheGptqFormatGoesThereAndBack) {
  const std::string path = "transformer.h.1.attn.c_proj";
  const std::map<std::string, CodedLinear> linears = {{path_, {coded(72, 24, 4, true), {}}},
                                                      {path, {coded(24, 24, 8, false), at::rand({24})}}};
  save_coded_checkpoint(in_(), out_(), CheckpointFormat::kGptq, linears, {{"quantizer", {"libgptq:0"}}});
  const Json settings = read_json_object(folder_.path("out/quantize_config.json"));
  EXPECT_EQ(read_json_object(folder_.path("out/config.json"))["quantization_config"], settings);
  EXPECT_EQ(settings["checkpoint_format"], "gptq");
  EXPECT_EQ(settings["desc_act"], true);
  EXPECT_EQ(settings["dynamic"].size(), 7);  // six linears that keep their weights, and one that deviates
  const auto store = TensorStore::open(out_());
  EXPECT_EQ(store.tensor(path_ + ".qweight").sizes(), (std::vector<int64_t>{3, 72}));
  EXPECT_EQ(store.tensor(path + ".qweight").sizes(), (std::vector<int64_t>{6, 24}));
  EXPECT_TRUE(store.tensor(path + ".bias").equal(*linears.at(path).bias));
  EXPECT_EQ(TensorStore::open(out_()).tensor(path_ + ".g_idx")[0].item<int64_t>(), 1);
  convert_checkpoint(out_(), folder_.path("packed"), CheckpointFormat::kLibgptq, {});
  EXPECT_EQ(perplexity(folder_.path("packed")), perplexity(out_()));
  convert_checkpoint(folder_.path("packed"), folder_.path("back"), CheckpointFormat::kGptq, settings["meta"]);
  for (const char* name : {"model.safetensors", "config.json", "quantize_config.json"}) {
    EXPECT_EQ(folder_.read(std::string("back/") + name), folder_.read(std::string("out/") + name)) << name;
  }
  EXPECT_ERROR(convert_checkpoint(out_(), folder_.path("no"), CheckpointFormat::kGptq, {}), "is gptq already");
  EXPECT_ERROR(convert_checkpoint(in_(), folder_.path("no"), CheckpointFormat::kGptq, {}), "must be a quantized model");
}

TEST_F(SaveQuantized, ZeroPointsThatAreNotTheMiddleAreWrittenInVersion2) {
  CodedWeight weight = coded(72, 24, 4, false);
  weight.zeros = at::randint(16, {1, 72}, at::kByte);
  save_coded_checkpoint(in_(), out_(), CheckpointFormat::kGptq, {{path_, {weight, {}}}}, {});
  EXPECT_EQ(read_json_object(folder_.path("out/quantize_config.json"))["checkpoint_format"], "gptq_v2");
  EXPECT_ERROR(save_coded_checkpoint(in_(), out_(), CheckpointFormat::kGptq, {}, {}), "must be a quantized linear");
  EXPECT_ERROR(save_coded_checkpoint(in_(), out_(), CheckpointFormat::kGptq, {{"lm_head", {weight, {}}}}, {}),
               "lm_head must keep its weight");
}

TEST_F(SaveQuantized, FailuresLeaveNothingBehind) {
  EXPECT_ERROR(save_checkpoint(in_(), in_(), {}, {}), "must not be the source model's");
  EXPECT_ERROR(save_checkpoint(in_(), out_(), {{"transformer.h.7", packed(24, 72)}}, {}),
               "transformer.h.7 is no layer");
  EXPECT_ERROR(save_checkpoint(in_(), out_(), {{path_, QuantizedTensors()}}, {}), "must have packed and scales");
  EXPECT_ERROR(save_checkpoint(in_(), folder_.path("no/out"), {}, {}), "cannot be written");
  EXPECT_ERROR(save_torchscript(load_model(in_()).module, "/dev/full"), "No space left");
  EXPECT_EQ(folder_.count(), 1);
}

}  // namespace
}  // namespace gptq
