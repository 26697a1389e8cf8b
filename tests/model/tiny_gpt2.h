#pragma once

#include <gtest/gtest.h>
#include <torch/script.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>

#include "model/json_file.h"
#include "model/safetensors.h"
#include "tests/error_of.h"

namespace gptq::test {

/// A new folder that goes away with the object.
class TempFolder {
 public:
  TempFolder() {
    static std::atomic<int> counter{0};
    path_ = std::filesystem::temp_directory_path() /
            ("gptq-model-test-" + std::to_string(getpid()) + "-" + std::to_string(counter++));
    std::filesystem::create_directory(path_);
  }
  ~TempFolder() { std::filesystem::remove_all(path_); }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  std::string path(const std::string& name = "") const {
    return name.empty() ? path_.string() : (path_ / name).string();
  }
  void write(const std::string& name, const std::string& content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
  }
  std::string read(const std::string& name) const {
    std::ostringstream content;
    content << std::ifstream(path_ / name, std::ios::binary).rdbuf();
    return content.str();
  }
  /// Number of entries, hidden ones too.
  int64_t count() const {
    return std::distance(std::filesystem::directory_iterator(path_), std::filesystem::directory_iterator());
  }

 private:
  std::filesystem::path path_;
};

/// A small GPT-2's config.json; 24 wide with 3 heads, so that no size is a power of two.
inline Json tiny_config() {
  return {{"model_type", "gpt2"}, {"architectures", {"GPT2LMHeadModel"}},
          {"vocab_size", 53},     {"n_positions", 41},
          {"n_embd", 24},         {"n_layer", 2},
          {"n_head", 3},          {"n_inner", 37},
          {"bos_token_id", 52},   {"eos_token_id", 52}};
}

using Tensors = std::map<std::string, at::Tensor>;

/// Random tensors for a config, with canonical names; large enough that the model's predictions differ.
inline Tensors tiny_tensors(const Json& config, uint64_t seed = 0) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const int64_t width = config["n_embd"];
  const int64_t inner = config["n_inner"];
  Tensors result;
  const auto add = [&](const std::string& name, at::IntArrayRef shape, double mean = 0) {
    result[name] = at::randn(shape, generator) * 0.3 + mean;
  };
  add("transformer.wte.weight", {config["vocab_size"], width});
  add("transformer.wpe.weight", {config["n_positions"], width});
  add("transformer.ln_f.weight", {width}, 1);
  add("transformer.ln_f.bias", {width});
  for (int64_t layer = 0; layer < config["n_layer"]; ++layer) {
    const std::string block = "transformer.h." + std::to_string(layer) + ".";
    for (const char* norm : {"ln_1", "ln_2"}) {
      add(block + norm + ".weight", {width}, 1);
      add(block + norm + ".bias", {width});
    }
    const auto add_linear = [&](const std::string& name, int64_t k, int64_t n) {
      add(block + name + ".weight", {k, n});
      add(block + name + ".bias", {n});
    };
    add_linear("attn.c_attn", width, 3 * width);
    add_linear("attn.c_proj", width, width);
    add_linear("mlp.c_fc", width, inner);
    add_linear("mlp.c_proj", inner, width);
  }
  return result;
}

inline void write_model(const TempFolder& folder, const Json& config, const Tensors& tensors) {
  folder.write("config.json", config.dump());
  save_safetensors(folder.path("model.safetensors"), {tensors.begin(), tensors.end()});
}

inline void write_tiny_gpt2(const TempFolder& folder) {
  write_model(folder, tiny_config(), tiny_tensors(tiny_config()));
}

inline std::vector<int64_t> random_ids(int64_t count, int64_t vocabulary, uint64_t seed = 1) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const at::Tensor ids = at::randint(vocabulary, {count}, generator, at::kLong);
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + count};
}

}  // namespace gptq::test
