#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <set>

#include "model/atomic_output.h"
#include "model/checkpoint.h"
#include "model/gpt2_tensors.h"
#include "model/gptq_format.h"
#include "model/json_file.h"
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

Replacements replacements_of(const std::map<std::string, GptqLinear>& replaced, bool plain_zeros) {
  Replacements result;
  for (const auto& [path, linear] : replaced) {
    TORCH_CHECK(path != "lm_head", "lm_head must keep its weight in the gptq format, is quantized");
    const GptqTensors packed = pack_gptq(linear.weight, plain_zeros, path);
    auto& tensors = result[path];
    tensors = {
        {"qweight", packed.qweight}, {"qzeros", packed.qzeros}, {"scales", packed.scales}, {"g_idx", *packed.g_idx}};
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

const QuantizedTensors& weight_of(const QuantizedTensors& tensors) {
  return tensors;
}

const CodedWeight& weight_of(const GptqLinear& linear) {
  return linear.weight;
}

// Bits and group size of most of the linears: an lm_head of its own kind is the exception.
template <typename Linear>
QuantizationConfig::Module most_frequent(const std::map<std::string, Linear>& replaced) {
  std::map<std::pair<int64_t, int64_t>, int64_t> counts;
  for (const auto& [path, linear] : replaced) ++counts[{weight_of(linear).bits, weight_of(linear).group_size}];
  const auto most =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return {most->first.first, most->first.second};
}

// Layers quantized earlier stay as they are described, so that quantizing in two steps works.
Json libgptq_settings(const Json& previous, const std::map<std::string, QuantizedTensors>& replaced,
                      const Json& settings) {
  Json entry = settings.is_object() ? settings : Json::object();
  const auto common = most_frequent(replaced);
  entry["quant_method"] = "libgptq";
  entry["format"] = "w4";
  entry["version"] = 1;
  entry["bits"] = previous.contains("bits") ? previous["bits"] : Json(common.bits);
  entry["group_size"] = previous.contains("group_size") ? previous["group_size"] : Json(common.group_size);
  Json modules = previous.contains("modules") ? previous["modules"] : Json::object();
  for (const auto& [path, quantized] : replaced) {
    modules[path] = {{"bits", quantized.bits}, {"group_size", quantized.group_size}};
  }
  entry["modules"] = std::move(modules);
  return entry;
}

// A regular expression for this path and no other.
std::string exactly(const std::string& path) {
  std::string result = "^";
  for (const char c : path) {
    if (c == '.') result += '\\';
    result += c;
  }
  return result + "$";
}

// What deviates: linears that keep their weights, and other bits or group sizes.
Json dynamic_settings(const GPT2Config& config, const std::map<std::string, GptqLinear>& replaced,
                      QuantizationConfig::Module common) {
  Json result = Json::object();
  for (const auto& [path, shape] : config.linear_shapes()) {
    const auto found = replaced.find(path);
    if (found == replaced.end()) {
      if (path != "lm_head") result["-:" + exactly(path)] = Json::object();
      continue;
    }
    const CodedWeight& weight = found->second.weight;
    if (weight.bits == common.bits && weight.group_size == common.group_size) continue;
    result["+:" + exactly(path)] = {{"bits", weight.bits}, {"group_size", weight.group_size}};
  }
  return result;
}

bool is_symmetric(const CodedWeight& weight) {
  return weight.zeros.eq(int64_t{1} << (weight.bits - 1)).all().item<bool>();
}

Json gptq_settings(const std::string& source, const std::map<std::string, GptqLinear>& replaced, bool symmetric,
                   const Json& meta) {
  TORCH_CHECK(!replaced.empty(), "save_gptq_checkpoint: there must be a quantized linear, is none");
  const auto common = most_frequent(replaced);
  const bool reordered = std::any_of(replaced.begin(), replaced.end(),
                                     [](const auto& entry) { return entry.second.weight.input_order.has_value(); });
  const char* format = symmetric ? "gptq" : "gptq_v2";
  Json settings = {{"quant_method", "gptq"}, {"bits", common.bits},     {"group_size", common.group_size},
                   {"desc_act", reordered},  {"sym", symmetric},        {"lm_head", false},
                   {"pack_dtype", "int32"},  {"true_sequential", true}, {"checkpoint_format", format},
                   {"format", format},       {"method", "gptq"},        {"meta", meta}};
  const auto config = GPT2Config::read((fs::path(source) / "config.json").string());
  Json dynamic = dynamic_settings(config, replaced, common);
  if (!dynamic.empty()) settings["dynamic"] = std::move(dynamic);
  return settings;
}

void write_json(const std::string& path, const Json& json) {
  const std::string text = json.dump(2) + "\n";
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

// Json files by name, the tensors, and what is copied from the source; complete or not at all.
void write_folder(const std::string& source, const std::string& out, const std::map<std::string, Json>& files,
                  const Replacements& replaced) {
  std::error_code ignored;
  TORCH_CHECK(!fs::equivalent(source, out, ignored), out, ": output folder must not be the source model's");
  AtomicFolder folder(out);
  for (const auto& [name, json] : files) write_json(folder.file(name), json);
  save_safetensors(folder.file("model.safetensors"), gather_tensors(source, replaced), {{"format", "pt"}});
  for (const char* name : kCopiedFiles) {
    const fs::path from = fs::path(source) / name;
    if (fs::exists(from, ignored)) copy_file(from, folder.file(name));
  }
  folder.commit();
}

Json source_config(const std::string& source) {
  return read_json_object((fs::path(source) / "config.json").string());
}

}  // namespace

void save_checkpoint(const std::string& source, const std::string& out,
                     const std::map<std::string, QuantizedTensors>& replaced, const Json& settings) {
  Json config = source_config(source);
  if (!replaced.empty()) {
    Json previous = config.value("quantization_config", Json::object());
    if (previous.is_null() || previous.value("quant_method", Json()) != "libgptq") previous = Json::object();
    config["quantization_config"] = libgptq_settings(previous, replaced, settings);
  }
  write_folder(source, out, {{"config.json", config}}, replacements_of(replaced));
}

void save_gptq_checkpoint(const std::string& source, const std::string& out,
                          const std::map<std::string, GptqLinear>& replaced, const Json& meta) {
  const bool symmetric = std::all_of(replaced.begin(), replaced.end(),
                                     [](const auto& entry) { return is_symmetric(entry.second.weight); });
  Json config = source_config(source);
  const Json settings = gptq_settings(source, replaced, symmetric, meta);
  config["quantization_config"] = settings;
  write_folder(source, out, {{"config.json", config}, {"quantize_config.json", settings}},
               replacements_of(replaced, /*plain_zeros=*/!symmetric));
}

void convert_checkpoint(const std::string& in, const std::string& out, CheckpointFormat format, const Json& meta) {
  const LoadedModel model = load_model(in);  // every check
  TORCH_CHECK(model.kind == ModelKind::kHuggingFace, in,
              ": must be a Hugging Face folder, is of the kind: ", to_string(model.kind));
  const auto& settings = model.config->quantization;
  const TensorStore store = TensorStore::open(in);
  GPT2Tensors tensors(store);
  std::map<std::string, GptqLinear> linears;
  for (const auto& [path, shape] : model.config->linear_shapes()) {
    if (!is_quantized_linear(tensors, path)) continue;
    linears[path].weight = read_coded_linear(tensors, settings, path, shape);
  }
  TORCH_CHECK(!linears.empty(), in, ": must be a quantized model, has no quantized linear");
  TORCH_CHECK(settings->format != format, in, ": must be of the other format, is ",
              format == CheckpointFormat::kGptq ? "gptq" : "libgptq", " already");
  if (format == CheckpointFormat::kGptq) {
    TORCH_CHECK(linears.count("lm_head") == 0, in,
                ": lm_head must keep its weight in the gptq format, is quantized: quantize with --lm-head keep");
    save_gptq_checkpoint(in, out, linears, meta);
    return;
  }
  std::map<std::string, QuantizedTensors> packed;
  for (const auto& [path, linear] : linears) packed[path] = pack_weight(linear.weight);
  save_checkpoint(in, out, packed, {{"sym", settings->symmetric}});
}

}  // namespace gptq
