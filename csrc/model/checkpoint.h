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

/// Loads a Hugging Face GPT-2 folder (float, or quantized by libgptq, GPTQModel, AutoGPTQ or compressed-tensors), a
/// TorchScript file or an AOTInductor package, whose code then runs, in evaluation mode, on the CPU.
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
/// @param model_card README.md; empty: the source's, if it has one
void save_checkpoint(const std::string& source, const std::string& out,
                     const std::map<std::string, QuantizedTensors>& replaced, const nlohmann::json& settings,
                     const std::string& model_card = {});

/// What takes the place of one linear in a checkpoint of another format than libgptq's.
struct CodedLinear {
  CodedWeight weight;
  std::optional<at::Tensor> bias;  ///< [N], if it changed
};

/// Writes a Hugging Face folder in the format of other libraries, otherwise as save_checkpoint does.
/// kGptq: qweight, qzeros, scales and g_idx in place of each weight, and the settings in config.json and in
/// quantize_config.json. The checkpoint_format is "gptq", and "gptq_v2" where a zero point is not the middle code.
/// kCompressedTensors: weight_packed, weight_scale, weight_shape and, where a zero point is not the middle code,
/// weight_zero_point.
///
/// @param source Hugging Face folder; what it says of quantization is replaced
/// @param format not kLibgptq
/// @param replaced by the path of the linear; not lm_head. The settings name the linears that are left out, and those
///        whose bits or group size are not the most frequent
/// @param meta goes into the "meta" of kGptq's settings, beside the name of this library
/// @param model_card README.md; empty: the source's, if it has one
/// @throws c10::Error where check_gptq_fits or pack_compressed_tensors does, and where nothing is replaced
void save_coded_checkpoint(const std::string& source, const std::string& out, CheckpointFormat format,
                           const std::map<std::string, CodedLinear>& replaced, const nlohmann::json& meta,
                           const std::string& model_card = {});

/// Writes the quantized folder in another format, with the same codes, scales and zero points. The order of columns
/// within a group, which has no meaning, is kept by kLibgptq alone. The model card is carried over, with how the new
/// format is loaded.
/// @param in quantized Hugging Face folder
/// @param format to write; not the one that `in` has
/// @param meta see save_coded_checkpoint
/// @throws c10::Error where `in` is not quantized or has the format already, and where the format cannot hold it: a
///         quantized lm_head, or what save_coded_checkpoint refuses
void convert_checkpoint(const std::string& in, const std::string& out, CheckpointFormat format,
                        const nlohmann::json& meta);

/// Writes a TorchScript file; it appears complete or not at all.
void save_torchscript(const torch::jit::Module& module, const std::string& path);

}  // namespace gptq
