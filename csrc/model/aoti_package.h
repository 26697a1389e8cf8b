#pragma once

#include <torch/csrc/jit/api/module.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>

namespace gptq {

/// What is written beside the code of an AOTInductor package, by name: AOTI_DEVICE_KEY, AOTI_MACHINE, AOTI_CPU_ISA, and
/// torch_version, context_length and vocab_size where scripts/export_aoti.py made it.
using AotiMetadata = std::map<std::string, std::string>;

/// A language model that AOTInductor compiled.
struct AotiPackage {
  torch::jit::Module module;  ///< forward(input_ids i64 [B, T]) -> the first output; cannot be saved
  std::optional<int64_t> context_length;
};

/// Whether the file is an archive of torch.export.save or AOTInductor (.pt2). False where it cannot be read.
bool is_pt2_archive(const std::string& path);

/// Reads the metadata of a package. Runs nothing of it.
/// @param path a file for which is_pt2_archive holds
/// @throws c10::Error in one line, naming the file, what is required and what is there
AotiMetadata read_aoti_metadata(const std::string& path);

/// Loads the package's model "model". This runs code out of the file: a package is to be trusted as a program is.
/// @throws c10::Error in one line, before anything is run, if the package is for another device or machine than this
///         one's CPU, or was made by another torch
AotiPackage load_aoti_package(const std::string& path);

}  // namespace gptq
