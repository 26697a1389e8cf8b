#include "model/gpt2_config.h"

#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

using test::tiny_config;

GPT2Config with(const std::string& field, const Json& value) {
  Json json = tiny_config();
  json[field] = value;
  return GPT2Config::parse(json, "config.json");
}

TEST(GPT2Config, DefaultsAreThoseOfTransformers) {
  const auto config = GPT2Config::parse({{"model_type", "gpt2"}}, "config.json");
  EXPECT_EQ(config.vocab_size, 50257);
  EXPECT_EQ(config.n_positions, 1024);
  EXPECT_EQ(config.n_embd, 768);
  EXPECT_EQ(config.n_layer, 12);
  EXPECT_EQ(config.n_head, 12);
  EXPECT_EQ(config.n_inner, 3072);
  EXPECT_EQ(config.activation_function, "gelu_new");
  EXPECT_EQ(config.layer_norm_epsilon, 1e-5);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.attention_scale(3), 0.125);
  EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{50256});
  EXPECT_FALSE(config.quantization);
}

TEST(GPT2Config, FieldsThatChangeTheResult) {
  EXPECT_EQ(with("n_inner", nullptr).n_inner, 96);
  EXPECT_EQ(with("n_inner", 5).n_inner, 5);
  EXPECT_EQ(with("scale_attn_weights", false).attention_scale(1), 1.0);
  EXPECT_DOUBLE_EQ(with("scale_attn_by_inverse_layer_idx", true).attention_scale(1), 1 / std::sqrt(8.0) / 2);
  EXPECT_EQ(with("eos_token_id", {1, 2}).eos_token_ids, (std::vector<int64_t>{1, 2}));
  EXPECT_TRUE(with("eos_token_id", nullptr).eos_token_ids.empty());
  EXPECT_FALSE(with("bos_token_id", nullptr).bos_token_id);
  EXPECT_FALSE(with("tie_word_embeddings", false).tie_word_embeddings);
}

TEST(GPT2Config, ErrorsNameFileFieldRequirementAndValue) {
  EXPECT_ERROR(with("model_type", "llama"), "config.json: model_type must be \"gpt2\", got \"llama\"");
  EXPECT_ERROR(with("architectures", {"LlamaForCausalLM"}), "architectures must be GPT2LMHeadModel or GPT2Model");
  EXPECT_ERROR(with("architectures", "GPT2Model"), "architectures");
  EXPECT_ERROR(GPT2Config::parse(Json::object(), "config.json"), "model_type must be \"gpt2\", got null");
  for (const char* field : {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"}) {
    for (const Json& value :
         {Json(0), Json(-1), Json(1.5), Json("2"), Json(UINT64_MAX), Json(INT64_MAX), Json::array()}) {
      EXPECT_ERROR(with(field, value), std::string("config.json: ") + field + " must be an integer in 1..") << value;
    }
  }
  EXPECT_ERROR(with("n_head", 5), "n_embd must be a multiple of n_head = 5, got 24");
  EXPECT_ERROR(with("activation_function", "gelu_old"), "activation_function must be a known one");
  EXPECT_ERROR(with("activation_function", 3), "activation_function must be a string, got 3");
  EXPECT_ERROR(with("layer_norm_epsilon", 0), "layer_norm_epsilon must be a number between 0 and 1, got 0");
  EXPECT_ERROR(with("layer_norm_epsilon", "small"), "layer_norm_epsilon");
  EXPECT_ERROR(with("scale_attn_weights", 1), "scale_attn_weights must be true or false, got 1");
  EXPECT_ERROR(with("add_cross_attention", true), "add_cross_attention must be false");
  EXPECT_ERROR(with("eos_token_id", "end"), "eos_token_id must be an integer or null, got \"end\"");
}

TEST(GPT2Config, QuantizationSettings) {
  const Json good = {{"quant_method", "libgptq"},
                     {"format", "w4"},
                     {"version", 1},
                     {"bits", 4},
                     {"group_size", 64},
                     {"modules", {{"a", {{"group_size", -1}}}, {"b", {{"bits", 8}}}}}};
  const auto config = with("quantization_config", good).quantization;
  ASSERT_TRUE(config);
  EXPECT_EQ(config->of("other").group_size, 64);
  EXPECT_EQ(config->of("a").group_size, -1);
  EXPECT_EQ(config->of("a").bits, 4);
  EXPECT_EQ(config->of("b").bits, 8);
  const auto changed = [&](const std::string& field, const Json& value) {
    Json json = good;
    json[field] = value;
    return with("quantization_config", json);
  };
  EXPECT_ERROR(changed("quant_method", "awq"),
               "quantization_config: quant_method must be \"libgptq\", \"gptq\" or \"compressed-tensors\", got "
               "\"awq\"");
  EXPECT_ERROR(changed("version", 2), "version must be 1, got 2");
  EXPECT_ERROR(changed("compute", "int4"), "compute must be \"exact\", \"bf16\" or \"int8\", got \"int4\"");
  EXPECT_ERROR(changed("compute", 8), "compute must be a string, got 8");
  EXPECT_ERROR(changed("bits", 9), "bits must be an integer from 2 to 8, got 9");
  EXPECT_ERROR(changed("bits", 4.5), "bits must be an integer from 2 to 8, got 4.5");
  EXPECT_ERROR(changed("bits", "four"), "bits must be an integer from 2 to 8, got \"four\"");
  EXPECT_ERROR(changed("group_size", 0), "group_size must be");
  EXPECT_ERROR(changed("modules", Json::array()), "modules must be an object");
  EXPECT_ERROR(changed("modules", {{"a", 1}}), "modules: \"a\" must be an object");
  EXPECT_ERROR(with("quantization_config", 7), "quantization_config must be an object");
}

TEST(GPT2Config, QuantizationSettingsOfTheGptqFormat) {
  const Json good = {{"quant_method", "gptq"},
                     {"checkpoint_format", "gptq"},
                     {"bits", 4},
                     {"group_size", 64},
                     {"meta", {{"quantizer", {"other:1.0"}}}},
                     {"dynamic", {{"+:^a\\.b$", {{"bits", 8}}}, {"-:c", Json::object()}, {"d", {{"group_size", -1}}}}}};
  const auto changed = [&](const std::string& field, const Json& value) {
    Json json = good;
    json[field] = value;
    return *with("quantization_config", json).quantization;
  };
  const auto config = *with("quantization_config", good).quantization;
  EXPECT_EQ(config.format, CheckpointFormat::kGptq);
  EXPECT_EQ(config.gptq_zeros, GptqZeros::kLessOne);
  EXPECT_EQ(config.of("a.b").bits, 8);
  EXPECT_EQ(config.of("a.b").group_size, 64);
  EXPECT_EQ(config.of("a.b.c").bits, 4);
  EXPECT_EQ(config.of("xd").group_size, 64);  // from the start only
  EXPECT_EQ(config.of("dx").group_size, -1);
  EXPECT_EQ(changed("checkpoint_format", "gptq_v2").gptq_zeros, GptqZeros::kPlain);
  EXPECT_EQ(changed("meta", {{"quantizer", {"gptqmodel:7.7.0"}}}).gptq_zeros, GptqZeros::kLessOneByWord);
  EXPECT_TRUE(config.symmetric);
  EXPECT_FALSE(changed("sym", false).symmetric);
  EXPECT_FALSE(changed("dynamic", {{"a", {{"sym", false}}}}).symmetric);
  EXPECT_ERROR(changed("checkpoint_format", "gptq_p"), "checkpoint_format must be \"gptq\" or \"gptq_v2\"");
  EXPECT_ERROR(changed("bits", 6), "bits must be 2, 3, 4 or 8, got 6");
  EXPECT_ERROR(changed("bits", nullptr), "bits must be 2, 3, 4 or 8, got null");
  EXPECT_ERROR(changed("pack_dtype", "int64"), "pack_dtype must be \"int32\", got \"int64\"");
  EXPECT_ERROR(changed("is_marlin_format", true), "is_marlin_format must be false");
  const auto runaway = changed("dynamic", {{"(([a-z]+)+)+[0-9]", {{"bits", 8}}}});
  EXPECT_ERROR(runaway.of(std::string(200, 'a')), "dynamic: \"(([a-z]+)+)+[0-9]\" must not repeat without end");
  EXPECT_ERROR(changed("adapter", {{"name", "lora"}}), "adapter must be null");
  EXPECT_ERROR(changed("dynamic", {{"+:(", Json::object()}}), "must be a regular expression");
  EXPECT_ERROR(changed("dynamic", {{"a", 1}}), "dynamic: \"a\" must be an object");
  EXPECT_ERROR(changed("dynamic", {{"a", {{"bits", 2}}}, {"a.", {{"bits", 3}}}}).of("ab"), "must match one pattern");
}

TEST(GPT2Config, MalformedFiles) {
  const test::TempFolder folder;
  EXPECT_ERROR(GPT2Config::read(folder.path("config.json")), "cannot be opened");
  folder.write("config.json", "{\"model_type\": \"gpt2\",");
  EXPECT_ERROR(GPT2Config::read(folder.path("config.json")), "config.json: offset 22: not valid JSON");
  folder.write("quantize_config.json", R"({"bits": 3})");
  folder.write("config.json", tiny_config().dump());
  EXPECT_EQ(GPT2Config::read(folder.path("config.json")).quantization->defaults.bits, 3);
  folder.write("quantize_config.json", R"({"bits": 33})");
  EXPECT_ERROR(GPT2Config::read(folder.path("config.json")), "quantize_config.json: bits must be 2, 3, 4 or 8, got 33");
  folder.write("config.json", "[1]");
  EXPECT_ERROR(GPT2Config::read(folder.path("config.json")), "must be a JSON object, got [1]");
  folder.write("config.json", R"({"n_embd": 1, "n_embd": 2})");
  EXPECT_ERROR(GPT2Config::read(folder.path("config.json")), "no duplicate key, has \"n_embd\" twice");
}

}  // namespace
}  // namespace gptq
