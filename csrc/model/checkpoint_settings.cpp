#include "model/checkpoint_settings.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "model/json_file.h"
#include "model/path_pattern.h"

namespace gptq {

namespace {

const QuantizedTensors& weight_of(const QuantizedTensors& tensors) {
  return tensors;
}

const CodedWeight& weight_of(const CodedLinear& linear) {
  return linear.weight;
}

// Bits and group size of most of the linears: an lm_head of its own kind is the exception.
template <typename Linear>
QuantizationConfig::Module most_frequent(const std::map<std::string, Linear>& replaced) {
  std::map<std::pair<int64_t, int64_t>, int64_t> counts;
  for (const auto& [path, linear] : replaced) ++counts[{weight_of(linear).bits, weight_of(linear).group_size}];
  const auto most =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return {most->first.first, most->first.second};
}

// What deviates: linears that keep their weights, and other bits or group sizes.
Json dynamic_settings(const GPT2Config& config, const std::map<std::string, CodedLinear>& replaced,
                      QuantizationConfig::Module common) {
  Json result = Json::object();
  for (const auto& [path, shape] : config.linear_shapes()) {
    const auto found = replaced.find(path);
    if (found == replaced.end()) {
      if (path != "lm_head") result["-:" + exactly(path)] = Json::object();
      continue;
    }
    const CodedWeight& weight = found->second.weight;
    if (weight.bits == common.bits && weight.group_size == common.group_size) continue;
    result["+:" + exactly(path)] = {{"bits", weight.bits}, {"group_size", weight.group_size}};
  }
  return result;
}

}  // namespace

bool is_symmetric(const CodedWeight& weight) {
  return weight.zeros.eq(int64_t{1} << (weight.bits - 1)).all().item<bool>();
}

Json libgptq_settings(const Json& previous, const std::map<std::string, QuantizedTensors>& replaced,
                      const Json& settings) {
  Json entry = settings.is_object() ? settings : Json::object();
  const auto common = most_frequent(replaced);
  entry["quant_method"] = "libgptq";
  entry["format"] = "w4";
  entry["version"] = 1;
  entry["bits"] = previous.contains("bits") ? previous["bits"] : Json(common.bits);
  entry["group_size"] = previous.contains("group_size") ? previous["group_size"] : Json(common.group_size);
  Json modules = previous.contains("modules") ? previous["modules"] : Json::object();
  for (const auto& [path, quantized] : replaced) {
    modules[path] = {{"bits", quantized.bits}, {"group_size", quantized.group_size}};
  }
  entry["modules"] = std::move(modules);
  return entry;
}

Json gptq_settings(const GPT2Config& config, const std::map<std::string, CodedLinear>& replaced, const Json& meta) {
  const auto common = most_frequent(replaced);
  const bool reordered = std::any_of(replaced.begin(), replaced.end(),
                                     [](const auto& entry) { return entry.second.weight.input_order.has_value(); });
  const bool symmetric = std::all_of(replaced.begin(), replaced.end(),
                                     [](const auto& entry) { return is_symmetric(entry.second.weight); });
  const char* format = symmetric ? "gptq" : "gptq_v2";
  Json settings = {{"quant_method", "gptq"}, {"bits", common.bits},     {"group_size", common.group_size},
                   {"desc_act", reordered},  {"sym", symmetric},        {"lm_head", false},
                   {"pack_dtype", "int32"},  {"true_sequential", true}, {"checkpoint_format", format},
                   {"format", format},       {"method", "gptq"},        {"meta", meta}};
  Json dynamic = dynamic_settings(config, replaced, common);
  if (!dynamic.empty()) settings["dynamic"] = std::move(dynamic);
  return settings;
}

Json compressed_tensors_settings(const GPT2Config& config, const std::map<std::string, CodedLinear>& replaced) {
  std::map<std::string, CompressedTensorsLayout> linears;
  std::vector<std::string> ignore;
  for (const auto& [path, shape] : config.linear_shapes()) {
    const auto found = replaced.find(path);
    if (found == replaced.end()) {
      ignore.push_back(path);
      continue;
    }
    const CodedWeight& weight = found->second.weight;
    linears[path] = {weight.bits, weight.group_size, is_symmetric(weight)};
  }
  return compressed_tensors_settings(linears, ignore);
}

}  // namespace gptq
