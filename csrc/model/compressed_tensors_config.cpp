#include "model/compressed_tensors_config.h"

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "model/json_fields.h"

namespace gptq {

namespace {

constexpr const char* kFormat = "pack-quantized";
constexpr const char* kExpression = "re:";
constexpr std::array<const char*, 2> kClasses = {"Linear", "Conv1D"};

bool is_class(const std::string& target) {
  return std::find(kClasses.begin(), kClasses.end(), target) != kClasses.end();
}

void require_format(const JsonFields& fields) {
  std::string format = kFormat;
  fields.text("format", format);
  if (format != kFormat) fields.fail("format", show(kFormat), format);
}

void require_none(const JsonFields& fields, const char* name) {
  if (const Json* value = fields.find(name); value != nullptr && !value->empty()) fields.fail(name, "null", *value);
}

// -1: one group per row.
int64_t read_group_size(const JsonFields& fields) {
  const Json* size = fields.find("group_size");
  const bool is_whole_row = size == nullptr || *size == -1;
  std::string strategy = size == nullptr ? "tensor" : is_whole_row ? "channel" : "group";
  fields.text("strategy", strategy);
  if (strategy != "group" && strategy != "channel") fields.fail("strategy", "\"group\" or \"channel\"", strategy);
  if (strategy == "channel") {
    if (!is_whole_row) fields.fail("group_size", "null with the strategy \"channel\"", *size);
    return -1;
  }
  int64_t result = 0;
  if (is_whole_row) fields.fail("group_size", "a positive integer with the strategy \"group\"", size ? *size : Json());
  fields.size("group_size", result);
  return result;
}

CompressedTensorsLayout read_weights(const JsonFields& fields) {
  const Json* bits = fields.find("num_bits");
  const bool known = bits != nullptr && bits->is_number_integer() && *bits >= 2 && *bits <= 8;
  if (!known) fields.fail("num_bits", "an integer from 2 to 8", bits != nullptr ? *bits : Json());
  std::string type = "int";
  fields.text("type", type);
  if (type != "int") fields.fail("type", "\"int\"", type);
  bool dynamic = false;
  fields.flag("dynamic", dynamic);
  if (dynamic) fields.fail("dynamic", "false", dynamic);
  CompressedTensorsLayout result;
  result.bits = bits->get<int64_t>();
  result.group_size = read_group_size(fields);
  fields.flag("symmetric", result.symmetric);
  return result;
}

using Key = std::tuple<int64_t, int64_t, bool>;

Key key_of(const CompressedTensorsLayout& layout) {
  return {layout.bits, layout.group_size, layout.symmetric};
}

Json group_settings(const CompressedTensorsLayout& layout, const std::vector<std::string>& targets) {
  const bool is_channel = layout.group_size == -1;
  const Json weights = {{"num_bits", layout.bits},
                        {"type", "int"},
                        {"symmetric", layout.symmetric},
                        {"strategy", is_channel ? "channel" : "group"},
                        {"group_size", is_channel ? Json() : Json(layout.group_size)},
                        {"dynamic", false}};
  return {{"targets", targets}, {"weights", weights}, {"input_activations", nullptr}, {"output_activations", nullptr}};
}

}  // namespace

bool CompressedTensorsConfig::names(const Target& target, const std::string& path) {
  return target.pattern ? target.pattern->matches(path) : target.text == path;
}

CompressedTensorsLayout CompressedTensorsConfig::of(const std::string& path) const {
  const auto settings = [&](const char* name) { return std::string("config.json: quantization_config: ") + name; };
  for (const Target& target : ignore_) {
    TORCH_CHECK(!names(target, path) && !is_class(target.text), settings("ignore"), " must not match ", show(path),
                ", which is packed in the checkpoint, got ", show(target.text));
  }
  const auto found =
      std::find_if(groups_.begin(), groups_.end(), [&](const Group& group) { return names(group.target, path); });
  if (found != groups_.end()) return found->layout;
  const auto by_class =
      std::find_if(groups_.begin(), groups_.end(), [](const Group& group) { return is_class(group.target.text); });
  TORCH_CHECK(by_class != groups_.end(), settings("config_groups"), " must have a target for ", show(path),
              ", which is packed in the checkpoint, has none");
  return by_class->layout;
}

CompressedTensorsConfig::Target CompressedTensorsConfig::parse_target(const Json& json, const std::string& where) {
  TORCH_CHECK(json.is_string(), where, " must be a string, got ", show(json));
  Target target{json.get<std::string>(), {}};
  if (target.text.starts_with(kExpression)) {
    target.pattern.emplace(target.text.substr(std::string(kExpression).size()), where + ": " + show(json));
  }
  return target;
}

void CompressedTensorsConfig::add_group(const Json& json, const std::string& where) {
  TORCH_CHECK(json.is_object(), where, " must be an object, got ", show(json));
  const JsonFields fields(json, where);
  require_format(fields);
  require_none(fields, "input_activations");
  require_none(fields, "output_activations");
  const Json* weights = fields.find("weights");
  if (weights == nullptr || !weights->is_object()) fields.fail("weights", "an object", weights ? *weights : Json());
  const CompressedTensorsLayout layout = read_weights(JsonFields(*weights, where + ": weights"));
  const Json* targets = fields.find("targets");
  if (targets == nullptr || !targets->is_array()) fields.fail("targets", "an array", targets ? *targets : Json());
  for (const Json& item : *targets) {
    Target target = parse_target(item, where + ": targets");
    const auto same = std::find_if(groups_.begin(), groups_.end(),
                                   [&](const Group& group) { return group.target.text == target.text; });
    TORCH_CHECK(same == groups_.end() || key_of(same->layout) == key_of(layout), where, ": targets must not have ",
                show(item), " of another group, which differs");
    groups_.push_back({std::move(target), layout});
  }
}

CompressedTensorsConfig CompressedTensorsConfig::parse(const JsonFields& fields) {
  require_format(fields);
  require_none(fields, "kv_cache_scheme");
  require_none(fields, "transform_config");
  const Json* sparsity = fields.find("sparsity_config");
  const bool is_dense = sparsity == nullptr || sparsity->empty() ||
                        (sparsity->is_object() && sparsity->value("format", Json()) == "dense");
  if (!is_dense) fields.fail("sparsity_config", "{} or of the format \"dense\"", *sparsity);
  CompressedTensorsConfig result;
  const Json* groups = fields.find("config_groups");
  if (groups == nullptr || !groups->is_object()) fields.fail("config_groups", "an object", groups ? *groups : Json());
  for (const auto& [name, group] : groups->items()) {
    result.add_group(group, fields.source() + ": config_groups: " + show(name));
  }
  std::sort(result.groups_.begin(), result.groups_.end(), [](const Group& a, const Group& b) {
    return std::pair(a.target.pattern.has_value(), a.target.text) <
           std::pair(b.target.pattern.has_value(), b.target.text);
  });
  const Json* ignore = fields.find("ignore");
  if (ignore == nullptr) return result;
  if (!ignore->is_array()) fields.fail("ignore", "an array", *ignore);
  for (const Json& item : *ignore) result.ignore_.push_back(parse_target(item, fields.source() + ": ignore"));
  return result;
}

Json compressed_tensors_settings(const std::map<std::string, CompressedTensorsLayout>& linears,
                                 const std::vector<std::string>& ignore) {
  std::map<Key, std::vector<std::string>> paths;
  std::map<Key, CompressedTensorsLayout> layouts;
  for (const auto& [path, layout] : linears) {
    paths[key_of(layout)].push_back(path);
    layouts[key_of(layout)] = layout;
  }
  std::vector<Key> order;
  order.reserve(paths.size());
  for (const auto& [key, of_key] : paths) order.push_back(key);
  std::stable_sort(order.begin(), order.end(),
                   [&](const Key& a, const Key& b) { return paths[a].size() > paths[b].size(); });
  Json groups = Json::object();
  for (size_t i = 0; i < order.size(); ++i) {
    const std::vector<std::string> targets = i == 0 ? std::vector<std::string>{kClasses[0]} : paths[order[i]];
    groups["group_" + std::to_string(i)] = group_settings(layouts[order[i]], targets);
  }
  return {{"quant_method", "compressed-tensors"},
          {"format", kFormat},
          {"quantization_status", "compressed"},
          {"global_compression_ratio", nullptr},
          {"kv_cache_scheme", nullptr},
          {"config_groups", std::move(groups)},
          {"ignore", ignore}};
}

}  // namespace gptq
