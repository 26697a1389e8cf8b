#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "model/coded_weight.h"
#include "model/gpt2_config.h"

namespace gptq {

enum class ModelKind { kHuggingFace, kTorchScript, kAotInductor };

/// "Hugging Face folder" for one.
const char* to_string(ModelKind kind);

struct LoadedModel {
  torch::jit::Module module;
  ModelKind kind;
  std::string source;                     ///< the folder or file it was loaded from
  std::optional<GPT2Config> config;       ///< of a Hugging Face folder
  std::optional<int64_t> context_length;  ///< most tokens a call can take, where that is known
};

/// Loads a Hugging Face GPT-2 folder (float, or quantized by libgptq, GPTQModel or AutoGPTQ), a TorchScript file or an
/// AOTInductor package, whose code then runs, in evaluation mode, on the CPU.
/// @throws c10::Error in one line, naming the file and the reason
LoadedModel load_model(const std::string& path);

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

/// What takes the place of one linear in a checkpoint of the GPTQ format.
struct GptqLinear {
  CodedWeight weight;
  std::optional<at::Tensor> bias;  ///< [N], if it changed
};

/// Writes a Hugging Face folder in the format of GPTQModel, AutoGPTQ and transformers: as save_checkpoint does, but
/// with qweight, qzeros, scales and g_idx in place of each quantized weight, and the settings in config.json and in
/// quantize_config.json. The checkpoint_format is "gptq", and "gptq_v2" where a zero point is not the middle code.
///
/// @param source Hugging Face folder; what it says of quantization is replaced
/// @param replaced by the path of the linear; not lm_head. "dynamic" names the linears that are left out, and those
///        whose bits or group size are not the most frequent
/// @param meta goes into the settings' "meta", beside the name of this library
/// @throws c10::Error where check_gptq_fits does, and where nothing is replaced
void save_gptq_checkpoint(const std::string& source, const std::string& out,
                          const std::map<std::string, GptqLinear>& replaced, const nlohmann::json& meta);

/// Writes the quantized folder in the other format, with the same codes, scales and zero points. The order of columns
/// within a group, which has no meaning, is not kept by the GPTQ format.
/// @param in quantized Hugging Face folder
/// @param format to write; not the one that `in` has
/// @throws c10::Error where `in` is not quantized or has the format already, and where the GPTQ format cannot hold it:
/// a
///        packed lm_head, or what check_gptq_fits refuses
void convert_checkpoint(const std::string& in, const std::string& out, CheckpointFormat format,
                        const nlohmann::json& meta);

/// Writes a TorchScript file; it appears complete or not at all.
void save_torchscript(const torch::jit::Module& module, const std::string& path);

}  // namespace gptq
