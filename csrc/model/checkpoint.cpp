#include "model/checkpoint.h"

#include <torch/csrc/jit/serialization/export.h>
#include <torch/script.h>

#include <array>
#include <filesystem>
#include <set>

#include "model/atomic_output.h"
#include "model/gpt2.h"
#include "model/json_file.h"
#include "model/safetensors.h"

namespace gptq {

namespace fs = std::filesystem;

namespace {

constexpr std::array kCopiedFiles = {"vocab.json",
                                     "merges.txt",
                                     "tokenizer.json",
                                     "tokenizer_config.json",
                                     "special_tokens_map.json",
                                     "added_tokens.json",
                                     "generation_config.json",
                                     "README.md",
                                     "LICENSE"};

std::string first_line(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

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

LoadedModel load_torchscript(const std::string& path) {
  {
    const auto file = MappedFile::open(path);
    const std::string_view start(reinterpret_cast<const char*>(file->data()), std::min<uint64_t>(file->size(), 4));
    TORCH_CHECK(start == std::string_view("PK\3\4", 4), path,
                ": offset 0: must be a Hugging Face folder or a TorchScript file, is neither");
  }
  LoadedModel result;
  result.kind = ModelKind::kTorchScript;
  result.source = path;
  try {
    result.module = torch::jit::load(path, at::kCPU);
    result.module.eval();
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, path, ": not a TorchScript file: ", first_line(error.what_without_backtrace()));
  } catch (const std::exception& error) {
    TORCH_CHECK(false, path, ": not a TorchScript file: ", first_line(error.what()));
  }
  TORCH_CHECK(result.module.find_method("forward"), path, ": TorchScript module must have a forward method");
  return result;
}

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

void add_quantized(NamedTensors& tensors, const std::string& path, const QuantizedTensors& quantized) {
  if (quantized.weight) {
    tensors.emplace_back(path + ".weight", *quantized.weight);
  } else {
    TORCH_CHECK(quantized.packed.defined() && quantized.scales.defined(), "save_checkpoint: ", path,
                " must have packed and scales, or weight");
    tensors.emplace_back(path + ".packed", quantized.packed);
    tensors.emplace_back(path + ".scales", quantized.scales);
    if (quantized.zeros) tensors.emplace_back(path + ".zeros", *quantized.zeros);
    if (quantized.input_order) tensors.emplace_back(path + ".input_order", *quantized.input_order);
  }
  if (quantized.bias) tensors.emplace_back(path + ".bias", *quantized.bias);
}

// Whether the tensor of the source belongs to a linear that is replaced, and is replaced itself.
bool is_replaced(const std::string& name, const std::map<std::string, QuantizedTensors>& replaced) {
  const size_t dot = name.rfind('.');
  const auto found = replaced.find(name.substr(0, dot));
  if (found == replaced.end()) return false;
  const std::string leaf = name.substr(dot + 1);
  return leaf != "bias" || found->second.bias;
}

NamedTensors gather_tensors(const std::string& source, const std::map<std::string, QuantizedTensors>& replaced) {
  const TensorStore store = TensorStore::open(source);
  NamedTensors tensors;
  std::set<std::string> layers;
  for (const auto& name : store.names()) {
    const std::string canonical = canonical_gpt2_name(name);
    layers.insert(canonical.substr(0, canonical.rfind('.')));
    if (is_ignored_gpt2_tensor(canonical) || is_replaced(canonical, replaced)) continue;
    tensors.emplace_back(canonical, store.tensor(name));
  }
  for (const auto& [path, quantized] : replaced) {
    // A tied head has no tensor of its own in the source.
    TORCH_CHECK(layers.count(path) > 0 || path == "lm_head", "save_checkpoint: ", path, " is no layer of ",
                store.path());
    add_quantized(tensors, path, quantized);
  }
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return tensors;
}

// Layers quantized earlier stay as they are described, so that quantizing in two steps works.
Json quantization_entry(const Json& previous, const std::map<std::string, QuantizedTensors>& replaced,
                        const Json& settings) {
  Json entry = settings.is_object() ? settings : Json::object();
  const auto& first = replaced.begin()->second;
  entry["quant_method"] = "libgptq";
  entry["format"] = "w4";
  entry["version"] = 1;
  entry["bits"] = previous.contains("bits") ? previous["bits"] : Json(first.bits);
  entry["group_size"] = previous.contains("group_size") ? previous["group_size"] : Json(first.group_size);
  Json modules = previous.contains("modules") ? previous["modules"] : Json::object();
  for (const auto& [path, quantized] : replaced) {
    modules[path] = {{"bits", quantized.bits}, {"group_size", quantized.group_size}};
  }
  entry["modules"] = std::move(modules);
  return entry;
}

Json output_config(const std::string& source, const std::map<std::string, QuantizedTensors>& replaced,
                   const Json& settings) {
  Json config = read_json_object((fs::path(source) / "config.json").string());
  if (!replaced.empty()) {
    config["quantization_config"] =
        quantization_entry(config.value("quantization_config", Json::object()), replaced, settings);
  }
  const auto head = replaced.find("lm_head");
  if (head != replaced.end() && head->second.weight) config["tie_word_embeddings"] = false;
  return config;
}

void copy_file(const fs::path& from, const std::string& to) {
  const auto file = MappedFile::open(from.string());
  AtomicFile copy(to);
  copy.write(file->data(), file->size());
  copy.commit();
}

}  // namespace

LoadedModel load_model(const std::string& path) {
  std::error_code error;
  const auto status = fs::status(path, error);
  TORCH_CHECK(fs::exists(status), path, ": no such model folder or file");
  return fs::is_directory(status) ? load_folder(path) : load_torchscript(path);
}

void save_checkpoint(const std::string& source, const std::string& out,
                     const std::map<std::string, QuantizedTensors>& replaced, const Json& settings) {
  std::error_code ignored;
  TORCH_CHECK(!fs::equivalent(source, out, ignored), out, ": output folder must not be the source model's");
  AtomicFolder folder(out);
  const std::string config = output_config(source, replaced, settings).dump(2) + "\n";
  AtomicFile config_file(folder.file("config.json"));
  config_file.write(config.data(), config.size());
  config_file.commit();
  save_safetensors(folder.file("model.safetensors"), gather_tensors(source, replaced), {{"format", "pt"}});
  for (const char* name : kCopiedFiles) {
    const fs::path from = fs::path(source) / name;
    if (fs::exists(from, ignored)) copy_file(from, folder.file(name));
  }
  folder.commit();
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
