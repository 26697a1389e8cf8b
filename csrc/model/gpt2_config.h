#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "model/quantization_config.h"

namespace gptq {

/// y[M,N] = x[M,K] wᵀ
struct LinearShape {
  int64_t k;
  int64_t n;
};

/// config.json of a GPT-2. Every field that changes the result; the defaults are those of transformers' GPT2Config.
struct GPT2Config {
  int64_t vocab_size = 50257;
  int64_t n_positions = 1024;
  int64_t n_embd = 768;
  int64_t n_layer = 12;
  int64_t n_head = 12;
  int64_t n_inner = 0;  ///< 4 n_embd where the file says nothing or null
  std::string activation_function = "gelu_new";
  double layer_norm_epsilon = 1e-5;
  bool scale_attn_weights = true;
  bool scale_attn_by_inverse_layer_idx = false;
  bool tie_word_embeddings = true;
  std::optional<int64_t> bos_token_id = 50256;
  std::vector<int64_t> eos_token_ids = {50256};
  std::optional<QuantizationConfig> quantization;

  int64_t head_size() const { return n_embd / n_head; }
  /// What the product of query and key in a layer is multiplied by.
  double attention_scale(int64_t layer) const;
  /// Every linear that may be quantized, by its path: "transformer.h.0.attn.c_attn" for one.
  std::map<std::string, LinearShape> linear_shapes() const;

  /// Where the file has no quantization_config, a quantize_config.json beside it is taken for one.
  /// @throws c10::Error "<path>: <field> must be <requirement>, got <value>"
  static GPT2Config read(const std::string& path);
  static GPT2Config parse(const nlohmann::json& json, const std::string& source);
};

/// The activation as an expression of TorchScript in x, or nothing if the name is none that transformers gives one.
std::optional<std::string> activation_source(const std::string& name);

}  // namespace gptq
