#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <set>

#include "model/atomic_output.h"
#include "model/checkpoint.h"
#include "model/checkpoint_settings.h"
#include "model/compressed_tensors_format.h"
#include "model/gpt2_tensors.h"
#include "model/gptq_format.h"
#include "model/json_file.h"
#include "model/model_card.h"
#include "model/quantized_linear.h"
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

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;
/// By the path of the linear, then by the tensor's last name: "packed", "bias".
using Replacements = std::map<std::string, std::map<std::string, at::Tensor>>;

Replacements replacements_of(const std::map<std::string, QuantizedTensors>& replaced) {
  Replacements result;
  for (const auto& [path, quantized] : replaced) {
    auto& tensors = result[path];
    TORCH_CHECK(quantized.packed.defined() && quantized.scales.defined(), "save_checkpoint: ", path,
                " must have packed and scales, has not");
    tensors["packed"] = quantized.packed;
    tensors["scales"] = quantized.scales;
    if (quantized.zeros) tensors["zeros"] = *quantized.zeros;
    if (quantized.input_order) tensors["input_order"] = *quantized.input_order;
    if (quantized.bias) tensors["bias"] = *quantized.bias;
  }
  return result;
}

std::map<std::string, at::Tensor> stored_tensors(const GptqTensors& packed) {
  return {{"qweight", packed.qweight}, {"qzeros", packed.qzeros}, {"scales", packed.scales}, {"g_idx", *packed.g_idx}};
}

std::map<std::string, at::Tensor> stored_tensors(const CompressedTensors& packed) {
  std::map<std::string, at::Tensor> result = {
      {"weight_packed", packed.packed}, {"weight_scale", packed.scale}, {"weight_shape", packed.shape}};
  if (packed.zero_point) result["weight_zero_point"] = *packed.zero_point;
  return result;
}

// @param pack from a CodedWeight and its path to what stored_tensors takes
template <typename Pack>
Replacements replacements_of(const std::map<std::string, CodedLinear>& replaced, const Pack& pack) {
  Replacements result;
  for (const auto& [path, linear] : replaced) {
    auto& tensors = result[path] = stored_tensors(pack(linear.weight, path));
    if (linear.bias) tensors["bias"] = *linear.bias;
  }
  return result;
}

// Whether the tensor of the source belongs to a linear that is replaced, and is replaced itself.
bool is_replaced(const std::string& name, const Replacements& replaced) {
  const size_t dot = name.rfind('.');
  const auto found = replaced.find(name.substr(0, dot));
  if (found == replaced.end()) return false;
  return name.substr(dot + 1) != "bias" || found->second.count("bias") > 0;
}

NamedTensors gather_tensors(const std::string& source, const Replacements& replaced) {
  const TensorStore store = TensorStore::open(source);
  NamedTensors tensors;
  std::set<std::string> layers;
  for (const auto& name : store.names()) {
    const std::string canonical = canonical_gpt2_name(name);
    layers.insert(canonical.substr(0, canonical.rfind('.')));
    if (is_ignored_gpt2_tensor(canonical) || is_replaced(canonical, replaced)) continue;
    tensors.emplace_back(canonical, store.tensor(name));
  }
  for (const auto& [path, replacement] : replaced) {
    // A tied head has no tensor of its own in the source.
    TORCH_CHECK(layers.count(path) > 0 || path == "lm_head", "save_checkpoint: ", path, " is no layer of ",
                store.path());
    for (const auto& [leaf, tensor] : replacement) tensors.emplace_back(path + "." + leaf, tensor);
  }
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return tensors;
}

std::string text_of(const Json& json) {
  return json.dump(2) + "\n";
}

void write_text(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

void copy_file(const fs::path& from, const std::string& to) {
  const auto file = MappedFile::open(from.string());
  AtomicFile copy(to);
  copy.write(file->data(), file->size());
  copy.commit();
}

// Text files by name, the tensors, and what is copied from the source; complete or not at all.
void write_folder(const std::string& source, const std::string& out, const std::map<std::string, std::string>& files,
                  const Replacements& replaced) {
  std::error_code ignored;
  TORCH_CHECK(!fs::equivalent(source, out, ignored), out, ": output folder must not be the source model's");
  AtomicFolder folder(out);
  for (const auto& [name, text] : files) write_text(folder.file(name), text);
  save_safetensors(folder.file("model.safetensors"), gather_tensors(source, replaced), {{"format", "pt"}});
  for (const char* name : kCopiedFiles) {
    const fs::path from = fs::path(source) / name;
    if (files.count(name) == 0 && fs::exists(from, ignored)) copy_file(from, folder.file(name));
  }
  folder.commit();
}

Json source_config(const std::string& source) {
  return read_json_object((fs::path(source) / "config.json").string());
}

std::map<std::string, std::string> text_files(const Json& config, const std::string& model_card) {
  std::map<std::string, std::string> files = {{"config.json", text_of(config)}};
  if (!model_card.empty()) files["README.md"] = model_card;
  return files;
}

}  // namespace

void save_checkpoint(const std::string& source, const std::string& out,
                     const std::map<std::string, QuantizedTensors>& replaced, const Json& settings,
                     const std::string& model_card) {
  Json config = source_config(source);
  if (!replaced.empty()) {
    Json previous = config.value("quantization_config", Json::object());
    if (previous.is_null() || previous.value("quant_method", Json()) != "libgptq") previous = Json::object();
    config["quantization_config"] = libgptq_settings(previous, replaced, settings);
  }
  write_folder(source, out, text_files(config, model_card), replacements_of(replaced));
}

void save_coded_checkpoint(const std::string& source, const std::string& out, CheckpointFormat format,
                           const std::map<std::string, CodedLinear>& replaced, const Json& meta,
                           const std::string& model_card) {
  TORCH_CHECK(!replaced.empty(), "save_coded_checkpoint: there must be a quantized linear, is none");
  TORCH_CHECK(replaced.count("lm_head") == 0, "lm_head must keep its weight in the ", format_name(format),
              " format, is quantized");
  const auto shapes = GPT2Config::read((fs::path(source) / "config.json").string());
  Json config = source_config(source);
  switch (format) {
    case CheckpointFormat::kLibgptq: {
      TORCH_CHECK(false, "save_coded_checkpoint: format must not be libgptq, which save_checkpoint writes");
    }
    case CheckpointFormat::kGptq: {
      const Json settings = gptq_settings(shapes, replaced, meta);
      config["quantization_config"] = settings;
      auto files = text_files(config, model_card);
      files["quantize_config.json"] = text_of(settings);
      const bool plain_zeros = settings["checkpoint_format"] == "gptq_v2";
      const auto pack = [&](const CodedWeight& weight, const std::string& path) {
        return pack_gptq(weight, plain_zeros, path);
      };
      return write_folder(source, out, files, replacements_of(replaced, pack));
    }
    case CheckpointFormat::kCompressedTensors: {
      config["quantization_config"] = compressed_tensors_settings(shapes, replaced);
      const auto pack = [](const CodedWeight& weight, const std::string& path) {
        return pack_compressed_tensors(weight, is_symmetric(weight), path);
      };
      return write_folder(source, out, text_files(config, model_card), replacements_of(replaced, pack));
    }
  }
}

void convert_checkpoint(const std::string& in, const std::string& out, CheckpointFormat format, const Json& meta) {
  const LoadedModel model = load_model(in);  // every check
  TORCH_CHECK(model.kind == ModelKind::kHuggingFace, in,
              ": must be a Hugging Face folder, is of the kind: ", to_string(model.kind));
  const auto& settings = model.config->quantization;
  std::map<std::string, CodedLinear> linears;
  for (auto& [path, weight] : read_coded_linears(TensorStore::open(in), *model.config)) {
    linears[path].weight = std::move(weight);
  }
  TORCH_CHECK(!linears.empty(), in, ": must be a quantized model, has no quantized linear");
  TORCH_CHECK(settings->format != format, in, ": must be of another format, is ", format_name(format), " already");
  const std::string card = converted_card(in, format);
  if (format != CheckpointFormat::kLibgptq) {
    TORCH_CHECK(linears.count("lm_head") == 0, in, ": lm_head must keep its weight in the ", format_name(format),
                " format, is quantized: quantize with --lm-head keep");
    save_coded_checkpoint(in, out, format, linears, meta, card);
    return;
  }
  const bool symmetric =
      std::all_of(linears.begin(), linears.end(), [](const auto& entry) { return is_symmetric(entry.second.weight); });
  std::map<std::string, QuantizedTensors> packed;
  for (const auto& [path, linear] : linears) packed[path] = pack_weight(linear.weight);
  save_checkpoint(in, out, packed, {{"sym", symmetric}}, card);
}

}  // namespace gptq
