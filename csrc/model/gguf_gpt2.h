#pragma once

#include <map>
#include <string>

#include "model/checkpoint.h"
#include "model/gpt2_config.h"

namespace gptq {

/// That llama.cpp's GPT-2 computes what the config asks for and cuts text as the tokenizer does, so that a GGUF file
/// of the two can be written.
/// @param source Hugging Face folder, whose config.json it is
/// @param tokenizer folder with tokenizer.json, or vocab.json and merges.txt
/// @throws c10::Error "<file>: <field> must be <requirement> in a GGUF file, got <value>"
/// @throws std::runtime_error where the tokenizer files cannot be read
void check_gguf_model(const std::string& source, const std::string& tokenizer);

/// Writes a GGUF file of a GPT-2, as llama.cpp reads it. Every weight has the value it has here: the quantized ones in
/// the type that gguf_type_of gives, the others in their dtype (f64 as f32), and vectors as f32.
///
/// @param source Hugging Face folder that gives the config, and the tensors that are not replaced
/// @param tokenizer see check_gguf_model
/// @param out new file, or one to replace; appears complete or not at all
/// @param replaced by the path of the linear, "transformer.h.0.attn.c_attn" for one
/// @throws what check_gguf_model and gguf_type_of do
void save_gguf(const std::string& source, const std::string& tokenizer, const std::string& out,
               const std::map<std::string, CodedLinear>& replaced);

/// save_gguf of a quantized folder, with its own tokenizer.
/// @throws c10::Error where `in` is not quantized
void convert_to_gguf(const std::string& in, const std::string& out);

}  // namespace gptq
