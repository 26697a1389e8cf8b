#include "model/checkpoint.h"

#include <torch/csrc/jit/serialization/export.h>
#include <torch/script.h>

#include <filesystem>

#include "model/aoti_package.h"
#include "model/atomic_output.h"
#include "model/error_line.h"
#include "model/gpt2.h"
#include "model/safetensors.h"

namespace gptq {

namespace fs = std::filesystem;

namespace {

LoadedModel load_folder(const std::string& path) {
  const std::string config_path = (fs::path(path) / "config.json").string();
  std::error_code ignored;
  TORCH_CHECK(fs::exists(config_path, ignored), path, ": must hold config.json");
  LoadedModel result;
  result.kind = ModelKind::kHuggingFace;
  result.source = path;
  result.config = GPT2Config::read(config_path);
  result.context_length = result.config->n_positions;
  result.module = build_gpt2(*result.config, TensorStore::open(path));
  return result;
}

void check_is_archive(const std::string& path) {
  const auto file = MappedFile::open(path);
  const std::string_view start(reinterpret_cast<const char*>(file->data()), std::min<uint64_t>(file->size(), 4));
  TORCH_CHECK(start != "GGUF", path,
              ": GGUF files are written only, must be a Hugging Face folder or a TorchScript file");
  TORCH_CHECK(start == std::string_view("PK\3\4", 4), path,
              ": offset 0: must be a Hugging Face folder, a TorchScript file or an AOTInductor package, is none");
}

LoadedModel load_package(const std::string& path) {
  AotiPackage package = load_aoti_package(path);
  LoadedModel result;
  result.kind = ModelKind::kAotInductor;
  result.source = path;
  result.context_length = package.context_length;
  result.module = std::move(package.module);
  return result;
}

LoadedModel load_torchscript(const std::string& path) {
  LoadedModel result;
  result.kind = ModelKind::kTorchScript;
  result.source = path;
  try {
    result.module = torch::jit::load(path, at::kCPU);
    result.module.eval();
  } catch (const std::exception& error) {
    TORCH_CHECK(false, path, ": not a TorchScript file: ", error_line(error));
  }
  TORCH_CHECK(result.module.find_method("forward"), path, ": TorchScript module must have a forward method");
  return result;
}

}  // namespace

const char* to_string(ModelKind kind) {
  switch (kind) {
    case ModelKind::kHuggingFace:
      return "Hugging Face folder";
    case ModelKind::kTorchScript:
      return "TorchScript file";
    case ModelKind::kAotInductor:
      return "AOTInductor package";
  }
  return "model";
}

LoadedModel load_model(const std::string& path) {
  std::error_code error;
  const auto status = fs::status(path, error);
  TORCH_CHECK(fs::exists(status), path, ": no such model folder or file");
  if (fs::is_directory(status)) return load_folder(path);
  check_is_archive(path);
  return is_pt2_archive(path) ? load_package(path) : load_torchscript(path);
}

void save_torchscript(const torch::jit::Module& module, const std::string& path) {
  AtomicFile file(path);
  // The archive writer cannot be stopped half-way: its destructor would write on and throw again.
  std::exception_ptr failure;
  torch::jit::ExportModule(module, [&](const void* data, size_t size) {
    try {
      if (!failure) file.write(data, size);
    } catch (...) {
      failure = std::current_exception();
    }
    return size;
  });
  if (failure) std::rethrow_exception(failure);
  file.commit();
}

}  // namespace gptq
