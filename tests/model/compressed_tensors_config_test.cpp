#include "model/compressed_tensors_config.h"

#include "model/json_fields.h"
#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

Json weights(int64_t bits, const Json& group_size, bool symmetric = true) {
  return {{"num_bits", bits},
          {"type", "int"},
          {"symmetric", symmetric},
          {"strategy", group_size.is_null() ? "channel" : "group"},
          {"group_size", group_size}};
}

Json group(const Json& targets, const Json& of_weights) {
  return {{"targets", targets}, {"weights", of_weights}, {"input_activations", nullptr}};
}

Json good() {
  return {{"quant_method", "compressed-tensors"},
          {"format", "pack-quantized"},
          {"ignore", {"lm_head", "re:.*\\.2\\."}},
          {"config_groups",
           {{"group_0", group({"Linear"}, weights(4, 128))},
            {"group_1", group({"re:h\\.0\\.", "h.1.exact"}, weights(8, nullptr))},
            {"group_2", group({"h.0.exact"}, weights(3, 32, /*symmetric=*/false))}}}};
}

CompressedTensorsConfig parse(const Json& json) {
  return CompressedTensorsConfig::parse(JsonFields(json, "settings"));
}

TEST(CompressedTensorsConfig, PathsComeBeforeExpressionsAndClasses) {
  const auto config = parse(good());
  EXPECT_EQ(config.of("h.5.other").bits, 4);
  EXPECT_EQ(config.of("h.5.other").group_size, 128);
  EXPECT_TRUE(config.of("h.5.other").symmetric);
  EXPECT_EQ(config.of("h.0.other").bits, 8);
  EXPECT_EQ(config.of("h.0.other").group_size, -1);
  EXPECT_EQ(config.of("h.0.exact").bits, 3);
  EXPECT_EQ(config.of("h.0.exact").group_size, 32);
  EXPECT_FALSE(config.of("h.0.exact").symmetric);
  EXPECT_EQ(config.of("h.1.exact").bits, 8);
  EXPECT_EQ(config.of("x.h.0.other").bits, 4);  // from the start only
}

TEST(CompressedTensorsConfig, WhatIsWrittenIsReadTheSame) {
  const std::map<std::string, CompressedTensorsLayout> linears = {
      {"a", {4, 128, true}}, {"b", {4, 128, true}}, {"c", {8, -1, true}}, {"d", {4, 128, false}}};
  const Json written = compressed_tensors_settings(linears, {"lm_head"});
  EXPECT_EQ(written["config_groups"]["group_0"]["targets"], Json({"Linear"}));
  EXPECT_EQ(written["config_groups"].size(), 3u);
  const auto config = parse(written);
  for (const auto& [path, layout] : linears) {
    EXPECT_EQ(config.of(path).bits, layout.bits) << path;
    EXPECT_EQ(config.of(path).group_size, layout.group_size) << path;
    EXPECT_EQ(config.of(path).symmetric, layout.symmetric) << path;
  }
  EXPECT_ERROR(config.of("lm_head"), "ignore must not match \"lm_head\", which is packed in the checkpoint");
}

TEST(CompressedTensorsConfig, OldSettingsAreRead) {
  Json json = good();
  json["quantization_status"] = "frozen";
  json["sparsity_config"] = {{"format", "dense"}, {"sparsity_structure", "unstructured"}};
  json["transform_config"] = Json::object();
  json["version"] = "0.9.1";
  json["config_groups"]["group_0"]["weights"].update({{"actorder", "group"}, {"observer", "minmax"}});
  json["config_groups"]["group_0"]["weights"].erase("strategy");
  EXPECT_EQ(parse(json).of("h.5.other").group_size, 128);
}

TEST(CompressedTensorsConfig, MalformedSettingsAreNamed) {
  const auto refuse = [](const char* pointer, const Json& value, const std::string& part) {
    Json json = good();
    json[Json::json_pointer(pointer)] = value;
    EXPECT_ERROR(parse(json), part);
  };
  const std::string weights_path = "/config_groups/group_0/weights";
  const auto refuse_weights = [&](const char* field, const Json& value, const std::string& part) {
    refuse((weights_path + field).c_str(), value, "settings: config_groups: \"group_0\": weights" + part);
  };
  refuse("/format", "int-quantized", "settings: format must be \"pack-quantized\", got \"int-quantized\"");
  refuse("/config_groups/group_0/format", "dense", "\"group_0\": format must be \"pack-quantized\", got \"dense\"");
  refuse("/kv_cache_scheme", {{"num_bits", 8}}, "kv_cache_scheme must be null");
  refuse("/transform_config", {{"config_groups", 1}}, "transform_config must be null");
  refuse("/sparsity_config", {{"format", "sparse-bitmask"}}, "sparsity_config must be {} or of the format \"dense\"");
  refuse("/config_groups", Json::array(), "settings: config_groups must be an object, got []");
  refuse("/config_groups/group_0", {"Linear"}, "\"group_0\" must be an object, got [\"Linear\"]");
  refuse("/config_groups/group_0/targets", "Linear", "targets must be an array, got \"Linear\"");
  refuse("/config_groups/group_0/targets/0", 4, "targets must be a string, got 4");
  refuse("/config_groups/group_0/targets/0", "re:(", "\"re:(\" must be a regular expression");
  refuse("/config_groups/group_0/targets/0", "h.0.exact", "targets must not have \"h.0.exact\" of another group");
  refuse("/config_groups/group_0/input_activations", {{"num_bits", 8}}, "input_activations must be null");
  refuse("/ignore", "lm_head", "ignore must be an array");
  refuse("/ignore/0", Json::object(), "ignore must be a string, got {}");
  refuse_weights("", nullptr, " must be an object, got null");
  refuse_weights("/num_bits", nullptr, ": num_bits must be an integer from 2 to 8, got null");
  refuse_weights("/num_bits", 1, ": num_bits must be an integer from 2 to 8, got 1");
  refuse_weights("/num_bits", 4.5, ": num_bits must be an integer from 2 to 8, got 4.5");
  refuse_weights("/type", "float", ": type must be \"int\", got \"float\"");
  refuse_weights("/dynamic", true, ": dynamic must be false");
  refuse_weights("/strategy", "tensor", ": strategy must be \"group\" or \"channel\", got \"tensor\"");
  refuse_weights("/strategy", "channel", ": group_size must be null with the strategy \"channel\", got 128");
  refuse_weights("/group_size", -1, ": group_size must be a positive integer with the strategy \"group\", got -1");
  refuse_weights("/group_size", 0, ": group_size must be an integer in 1..");
  refuse_weights("/group_size", "128", ": group_size must be an integer in 1..");
}

TEST(CompressedTensorsConfig, ALinearWithoutATargetIsNamed) {
  Json json = good();
  json["config_groups"].erase("group_0");
  EXPECT_ERROR(parse(json).of("h.5.other"), "config_groups must have a target for \"h.5.other\"");
  EXPECT_ERROR(parse(good()).of("h.2.other"), "ignore must not match \"h.2.other\"");
  json["config_groups"]["group_1"]["targets"] = {"re:(([a-z]+)+)+[0-9]"};
  EXPECT_ERROR(parse(json).of(std::string(200, 'a')), "must not repeat without end");
}

// Every value in its place is another: read or refused, never another exception.
TEST(CompressedTensorsConfig, WhateverIsThereIsReadOrAnError) {
  const std::vector<Json> values = {nullptr, true,           -1,        0,       7.5,           1e300, UINT64_MAX,
                                    "",      "re:",          "Linear",  "group", Json::array(), {1},   {{}},
                                    {"a"},   Json::object(), {{"a", 1}}};
  const Json flat = good().flatten();
  int64_t refused = 0;
  for (const auto& [pointer, ignored] : flat.items()) {
    std::string part = pointer;
    for (; !part.empty(); part = part.substr(0, part.rfind('/'))) {
      for (const Json& value : values) {
        Json json = good();
        json[Json::json_pointer(part)] = value;
        refused += test::error_of([&] { parse(json).of("h.0.exact"); }) != test::kNoError;
      }
    }
  }
  EXPECT_GT(refused, 300);
}

}  // namespace
}  // namespace gptq
