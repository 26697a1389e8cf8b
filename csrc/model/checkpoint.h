#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "model/gpt2_config.h"

namespace gptq {

enum class ModelKind { kHuggingFace, kTorchScript };

struct LoadedModel {
  torch::jit::Module module;
  ModelKind kind;
  std::string source;                     ///< the folder or file it was loaded from
  std::optional<GPT2Config> config;       ///< of a Hugging Face folder
  std::optional<int64_t> context_length;  ///< most tokens a call can take, where that is known
};

/// Loads a Hugging Face GPT-2 folder (float, or quantized by libgptq) or a TorchScript file, in evaluation mode, on the
/// CPU.
/// @throws c10::Error in one line, naming the file and the reason
LoadedModel load_model(const std::string& path);

/// What takes the place of one linear's weight in a saved checkpoint: either the packed tensors or the dequantized
/// weight. With more than 4 bits the packed tensors are those of split_w8, and K below is twice the linear's.
struct QuantizedTensors {
  int64_t bits = 4;
  int64_t group_size = 128;               ///< columns per group, -1: one group per row
  at::Tensor packed;                      ///< u8 [ceil(N/16), ceil(K/8), 64]
  at::Tensor scales;                      ///< f16 [n_groups, N]
  std::optional<at::Tensor> zeros;        ///< u8 [n_groups, N]; absent means 8 everywhere
  std::optional<at::Tensor> input_order;  ///< i32 [K], see linear_w4; absent means none
  std::optional<at::Tensor> weight;  ///< f32, stored the way the linear stores it; instead of packed, scales and zeros
  std::optional<at::Tensor> bias;    ///< f32 [N], if it changed
};

/// Writes a Hugging Face folder that load_model reads back to the same bits: the source's config.json with a
/// "quantization_config", model.safetensors, and copies of the source's tokenizer files, generation_config.json and
/// model card. Tensors that are not replaced keep their bytes and dtype, under names with the prefix "transformer.".
///
/// @param source Hugging Face folder the model was loaded from
/// @param out new, empty or earlier model folder, not the source; appears complete or not at all
/// @param replaced by the path of the linear, "transformer.h.0.attn.c_attn" for one
/// @param settings further fields for "quantization_config" ("sym", "act_order", "damping", ...); the fields that
///        describe the format are set here and cannot be overridden
void save_checkpoint(const std::string& source, const std::string& out,
                     const std::map<std::string, QuantizedTensors>& replaced, const nlohmann::json& settings);

/// Writes a TorchScript file; it appears complete or not at all.
void save_torchscript(const torch::jit::Module& module, const std::string& path);

}  // namespace gptq
