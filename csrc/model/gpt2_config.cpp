#include "model/gpt2_config.h"

#include <torch/script.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "model/json_fields.h"

namespace gptq {

namespace {

constexpr int64_t kMaxLayers = 10'000;

void check_architecture(const JsonFields& fields) {
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

std::optional<int64_t> token_id(const JsonFields& fields, const char* name, const Json& value) {
  if (!value.is_number_integer() || value.is_number_float()) fields.fail(name, "an integer or null", value);
  const auto id = value.get<int64_t>();
  return id < 0 ? std::nullopt : std::optional<int64_t>(id);
}

void read_token_ids(const JsonFields& fields, const Json& json, GPT2Config& config) {
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

}  // namespace

double GPT2Config::attention_scale(int64_t layer) const {
  const double scale = scale_attn_weights ? 1.0 / std::sqrt(static_cast<double>(head_size())) : 1.0;
  return scale_attn_by_inverse_layer_idx ? scale / static_cast<double>(layer + 1) : scale;
}

GPT2Config GPT2Config::read(const std::string& path) {
  GPT2Config config = parse(read_json_object(path), path);
  const auto beside = std::filesystem::path(path).replace_filename("quantize_config.json");
  std::error_code ignored;
  if (!config.quantization && std::filesystem::exists(beside, ignored)) {
    config.quantization = QuantizationConfig::parse(read_json_object(beside.string()), beside.string(), "gptq");
  }
  return config;
}

GPT2Config GPT2Config::parse(const Json& json, const std::string& source) {
  const JsonFields fields(json, source);
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
    config.quantization = QuantizationConfig::parse(*quantization, source + ": quantization_config");
  }
  return config;
}

std::map<std::string, LinearShape> GPT2Config::linear_shapes() const {
  std::map<std::string, LinearShape> result;
  for (int64_t layer = 0; layer < n_layer; ++layer) {
    const std::string block = "transformer.h." + std::to_string(layer) + ".";
    result[block + "attn.c_attn"] = {n_embd, 3 * n_embd};
    result[block + "attn.c_proj"] = {n_embd, n_embd};
    result[block + "mlp.c_fc"] = {n_embd, n_inner};
    result[block + "mlp.c_proj"] = {n_inner, n_embd};
  }
  result["lm_head"] = {n_embd, vocab_size};
  return result;
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
