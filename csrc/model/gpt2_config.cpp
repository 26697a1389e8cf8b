#include "model/gpt2_config.h"

#include <torch/script.h>

#include <algorithm>
#include <cmath>

#include "model/json_file.h"

namespace gptq {

namespace {

// Far beyond any model, and small enough that no product of two sizes overflows.
constexpr int64_t kMaxSize = int64_t{1} << 30;
constexpr int64_t kMaxLayers = 10'000;

// Reads typed fields of one object. A field that is absent or null leaves the target as it is.
class Fields {
 public:
  Fields(const Json& json, std::string source) : json_(json), source_(std::move(source)) {}

  const Json* find(const char* name) const {
    const auto found = json_.find(name);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }

  [[noreturn]] void fail(const char* name, const std::string& requirement, const Json& value) const {
    TORCH_CHECK(false, source_, ": ", name, " must be ", requirement, ", got ", show(value));
  }

  void size(const char* name, int64_t& target, int64_t maximum = kMaxSize) const {
    const Json* value = find(name);
    if (value == nullptr) return;
    const bool in_range = value->is_number_unsigned() ? value->get<uint64_t>() <= static_cast<uint64_t>(maximum)
                                                      : value->is_number_integer() && value->get<int64_t>() <= maximum;
    if (!in_range || value->get<int64_t>() < 1) fail(name, "an integer in 1.." + std::to_string(maximum), *value);
    target = value->get<int64_t>();
  }

  void flag(const char* name, bool& target) const {
    const Json* value = find(name);
    if (value == nullptr) return;
    if (!value->is_boolean()) fail(name, "true or false", *value);
    target = value->get<bool>();
  }

  void text(const char* name, std::string& target) const {
    const Json* value = find(name);
    if (value == nullptr) return;
    if (!value->is_string()) fail(name, "a string", *value);
    target = value->get<std::string>();
  }

  void group_size(int64_t& target) const {
    const Json* value = find("group_size");
    if (value != nullptr && *value == -1) {
      target = -1;
    } else {
      size("group_size", target);
    }
  }

  void bits(int64_t& target) const {
    const Json* value = find("bits");
    if (value == nullptr) return;
    if (*value < 2 || *value > 8 || !value->is_number_integer()) fail("bits", "an integer from 2 to 8", *value);
    target = value->get<int64_t>();
  }

  const std::string& source() const { return source_; }

 private:
  const Json& json_;
  std::string source_;
};

void check_architecture(const Fields& fields) {
  const Json* type = fields.find("model_type");
  const Json* architectures = fields.find("architectures");
  if (type == nullptr && architectures == nullptr) fields.fail("model_type", "\"gpt2\"", nullptr);
  if (type != nullptr && *type != "gpt2") fields.fail("model_type", "\"gpt2\"", *type);
  if (architectures == nullptr) return;
  const auto known = [](const Json& name) { return name == "GPT2LMHeadModel" || name == "GPT2Model"; };
  if (!architectures->is_array() || !std::all_of(architectures->begin(), architectures->end(), known)) {
    fields.fail("architectures", "GPT2LMHeadModel or GPT2Model", *architectures);
  }
}

std::optional<int64_t> token_id(const Fields& fields, const char* name, const Json& value) {
  if (!value.is_number_integer() || value.is_number_float()) fields.fail(name, "an integer or null", value);
  const auto id = value.get<int64_t>();
  return id < 0 ? std::nullopt : std::optional<int64_t>(id);
}

void read_token_ids(const Fields& fields, const Json& json, GPT2Config& config) {
  if (json.contains("bos_token_id")) {
    const Json* value = fields.find("bos_token_id");
    config.bos_token_id = value == nullptr ? std::nullopt : token_id(fields, "bos_token_id", *value);
  }
  if (!json.contains("eos_token_id")) return;
  config.eos_token_ids.clear();
  const Json* value = fields.find("eos_token_id");
  if (value == nullptr) return;
  for (const Json& one : value->is_array() ? *value : Json::array({*value})) {
    if (const auto id = token_id(fields, "eos_token_id", one)) config.eos_token_ids.push_back(*id);
  }
}

QuantizationConfig read_quantization(const Json& json, const std::string& source) {
  TORCH_CHECK(json.is_object(), source, " must be an object, got ", show(json));
  const Fields fields(json, source);
  const auto require = [&](const char* name, const Json& wanted) {
    const Json* value = fields.find(name);
    if (value == nullptr || *value != wanted) fields.fail(name, show(wanted), value == nullptr ? Json() : *value);
  };
  require("quant_method", "libgptq");
  require("format", "w4");
  require("version", 1);
  QuantizationConfig result;
  fields.bits(result.defaults.bits);
  fields.group_size(result.defaults.group_size);
  fields.flag("sym", result.symmetric);
  const Json* modules = fields.find("modules");
  if (modules == nullptr) return result;
  if (!modules->is_object()) fields.fail("modules", "an object", *modules);
  for (const auto& [path, value] : modules->items()) {
    const std::string where = source + ": modules: " + show(path);
    TORCH_CHECK(value.is_object(), where, " must be an object, got ", show(value));
    const Fields module_fields(value, where);
    auto& module = result.modules.emplace(path, result.defaults).first->second;
    module_fields.bits(module.bits);
    module_fields.group_size(module.group_size);
  }
  return result;
}

}  // namespace

QuantizationConfig::Module QuantizationConfig::of(const std::string& path) const {
  const auto found = modules.find(path);
  return found == modules.end() ? defaults : found->second;
}

double GPT2Config::attention_scale(int64_t layer) const {
  const double scale = scale_attn_weights ? 1.0 / std::sqrt(static_cast<double>(head_size())) : 1.0;
  return scale_attn_by_inverse_layer_idx ? scale / static_cast<double>(layer + 1) : scale;
}

GPT2Config GPT2Config::read(const std::string& path) {
  return parse(read_json_object(path), path);
}

GPT2Config GPT2Config::parse(const Json& json, const std::string& source) {
  const Fields fields(json, source);
  check_architecture(fields);
  GPT2Config config;
  fields.size("vocab_size", config.vocab_size);
  fields.size("n_positions", config.n_positions);
  fields.size("n_embd", config.n_embd, int64_t{1} << 24);
  fields.size("n_layer", config.n_layer, kMaxLayers);
  fields.size("n_head", config.n_head);
  config.n_inner = 4 * config.n_embd;
  fields.size("n_inner", config.n_inner);
  TORCH_CHECK(config.n_embd % config.n_head == 0, source, ": n_embd must be a multiple of n_head = ", config.n_head,
              ", got ", config.n_embd);
  fields.text("activation_function", config.activation_function);
  TORCH_CHECK(activation_source(config.activation_function), source,
              ": activation_function must be a known one (gelu_new, gelu, relu, silu, ...), got ",
              show(config.activation_function));
  if (const Json* epsilon = fields.find("layer_norm_epsilon")) {
    const double value = epsilon->is_number() ? epsilon->get<double>() : -1;
    if (!(value > 0 && value < 1)) fields.fail("layer_norm_epsilon", "a number between 0 and 1", *epsilon);
    config.layer_norm_epsilon = value;
  }
  fields.flag("scale_attn_weights", config.scale_attn_weights);
  fields.flag("scale_attn_by_inverse_layer_idx", config.scale_attn_by_inverse_layer_idx);
  fields.flag("tie_word_embeddings", config.tie_word_embeddings);
  // Changes the order of operations only, since everything is computed in f32.
  bool reorder_and_upcast_attn = false;
  fields.flag("reorder_and_upcast_attn", reorder_and_upcast_attn);
  bool add_cross_attention = false;
  fields.flag("add_cross_attention", add_cross_attention);
  TORCH_CHECK(!add_cross_attention, source, ": add_cross_attention must be false, got true");
  read_token_ids(fields, json, config);
  if (const Json* quantization = fields.find("quantization_config")) {
    config.quantization = read_quantization(*quantization, source + ": quantization_config");
  }
  return config;
}

std::optional<std::string> activation_source(const std::string& name) {
  static const std::map<std::string, std::string> sources = {
      {"gelu_new", "torch.gelu(x, approximate='tanh')"},
      {"gelu_fast", "torch.gelu(x, approximate='tanh')"},
      {"gelu_accurate", "torch.gelu(x, approximate='tanh')"},
      {"gelu_pytorch_tanh", "torch.gelu(x, approximate='tanh')"},
      {"gelu_python_tanh", "torch.gelu(x, approximate='tanh')"},
      {"gelu", "torch.gelu(x)"},
      {"gelu_python", "torch.gelu(x)"},
      {"gelu_10", "torch.clamp(torch.gelu(x), -10, 10)"},
      {"quick_gelu", "x * torch.sigmoid(1.702 * x)"},
      {"relu", "torch.relu(x)"},
      {"relu2", "torch.square(torch.relu(x))"},
      {"relu6", "torch.clamp(x, 0, 6)"},
      {"leaky_relu", "torch.leaky_relu(x)"},
      {"silu", "torch.silu(x)"},
      {"swish", "torch.silu(x)"},
      {"mish", "torch.mish(x)"},
      {"hardswish", "torch.hardswish(x)"},
      {"sigmoid", "torch.sigmoid(x)"},
      {"tanh", "torch.tanh(x)"},
      {"linear", "x"},
  };
  const auto found = sources.find(name);
  return found == sources.end() ? std::nullopt : std::optional(found->second);
}

}  // namespace gptq
