#include "model/gguf_gpt2.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <unordered_set>

#include "model/gguf.h"
#include "model/gguf_blocks.h"
#include "model/gpt2_tensors.h"
#include "model/json_file.h"
#include "model/quantized_linear.h"
#include "model/safetensors.h"
#include "model/split_pattern.h"
#include "model/tokenizer_files.h"

namespace gptq {

namespace fs = std::filesystem;

namespace {

constexpr uint32_t kQuantizationVersion = 2;  // of the layout of blocks

// llama.cpp's kinds of tokens.
enum TokenType : int32_t { kNormal = 1, kControl = 3, kUserDefined = 4, kUnused = 5 };

std::string config_path(const std::string& source) {
  return (fs::path(source) / "config.json").string();
}

void check_config(const GPT2Config& config, const std::string& path) {
  // Several names stand for the same function.
  TORCH_CHECK(activation_source(config.activation_function) == activation_source("gelu_new"), path,
              ": activation_function must be gelu_new in a GGUF file, which llama.cpp's GPT-2 computes, got ",
              show(config.activation_function));
  TORCH_CHECK(config.scale_attn_weights, path,
              ": scale_attn_weights must be true in a GGUF file, as in llama.cpp's GPT-2, got false");
  TORCH_CHECK(!config.scale_attn_by_inverse_layer_idx, path,
              ": scale_attn_by_inverse_layer_idx must be false in a GGUF file, as in llama.cpp's GPT-2, got true");
}

bool has_every_byte(const BpeModel& model) {
  const std::unordered_set<std::string> tokens(model.tokens.begin(), model.tokens.end());
  for (int byte = 0; byte < 256; ++byte) {
    if (tokens.count(to_byte_alphabet(std::string(1, static_cast<char>(byte)))) == 0) return false;
  }
  return true;
}

void check_tokenizer(const TokenizerDefinition& definition, int64_t vocab_size) {
  const std::string& file = definition.file;
  const bool cuts_as_gpt2 = definition.stages.size() == 1 && definition.stages[0].regex == kGpt2SplitPattern;
  TORCH_CHECK(cuts_as_gpt2, file, ": pre_tokenizer must be GPT-2's ByteLevel in a GGUF file, is another");
  TORCH_CHECK(!definition.stages[0].add_prefix_space, file,
              ": add_prefix_space must be false in a GGUF file, as in llama.cpp's GPT-2, got true");
  TORCH_CHECK(!definition.model.ignore_merges, file,
              ": ignore_merges must be false in a GGUF file, as in llama.cpp's GPT-2, got true");
  TORCH_CHECK(!definition.model.unk_token || has_every_byte(definition.model), file,
              ": unk_token must be null in a GGUF file, or every byte a token, got ",
              show(definition.model.unk_token.value_or("")));
  for (const AddedToken& token : definition.added_tokens) {
    TORCH_CHECK(!token.single_word && !token.lstrip && !token.rstrip, file, ": added token ", show(token.content),
                ": single_word, lstrip and rstrip must be false in a GGUF file, are not");
    TORCH_CHECK(token.id < vocab_size, file, ": ids must be less than vocab_size, ", vocab_size, ", in a GGUF file, ",
                show(token.content), " has ", token.id);
  }
  const auto count = static_cast<int64_t>(definition.model.tokens.size());
  TORCH_CHECK(count <= vocab_size, file, ": there must be at most vocab_size, ", vocab_size,
              ", tokens in a GGUF file, are ", count);
}

TokenizerDefinition read_tokenizer(const GPT2Config& config, const std::string& folder) {
  TokenizerDefinition definition = read_tokenizer_files(folder);
  check_tokenizer(definition, config.vocab_size);
  return definition;
}

void add_architecture(GgufWriter& writer, const GPT2Config& config) {
  const auto count = [](int64_t value) { return static_cast<uint32_t>(value); };
  writer.add("general.architecture", "gpt2");
  writer.add("gpt2.context_length", count(config.n_positions));
  writer.add("gpt2.embedding_length", count(config.n_embd));
  writer.add("gpt2.feed_forward_length", count(config.n_inner));
  writer.add("gpt2.block_count", count(config.n_layer));
  writer.add("gpt2.attention.head_count", count(config.n_head));
  writer.add("gpt2.attention.layer_norm_epsilon", static_cast<float>(config.layer_norm_epsilon));
}

void add_tokenizer(GgufWriter& writer, const TokenizerDefinition& definition, const GPT2Config& config) {
  const auto size = static_cast<size_t>(config.vocab_size);
  std::vector<std::string> tokens = definition.model.tokens;
  std::vector<int32_t> types(tokens.size(), kNormal);
  tokens.resize(size);
  types.resize(size, kUnused);
  std::optional<int64_t> end_of_text;
  for (const AddedToken& token : definition.added_tokens) {
    const auto id = static_cast<size_t>(token.id);
    tokens[id] = token.content;
    types[id] = token.special ? kControl : kUserDefined;
  }
  for (size_t id = 0; id < size; ++id) {
    // llama.cpp wants a name for every row of the embedding, each another.
    if (types[id] == kUnused) tokens[id] = "[PAD" + std::to_string(id) + "]";
    if (tokens[id] == definition.end_of_text) end_of_text = static_cast<int64_t>(id);
  }
  std::vector<std::string> merges;
  merges.reserve(definition.model.merges.size());
  for (const auto& [left, right] : definition.model.merges) merges.push_back(left + " " + right);
  writer.add("tokenizer.ggml.model", "gpt2");
  writer.add("tokenizer.ggml.pre", "gpt-2");
  writer.add("tokenizer.ggml.tokens", std::move(tokens));
  writer.add("tokenizer.ggml.token_type", std::move(types));
  writer.add("tokenizer.ggml.merges", std::move(merges));
  // Without such a key llama.cpp takes token 11; with an id beyond the vocabulary it warns and takes it too.
  const auto add_id = [&](const char* key, std::optional<int64_t> id) {
    if (!id || *id >= config.vocab_size) id = end_of_text;
    if (id) writer.add(key, static_cast<uint32_t>(*id));
  };
  add_id("tokenizer.ggml.bos_token_id", config.bos_token_id);
  add_id("tokenizer.ggml.eos_token_id",
         config.eos_token_ids.empty() ? std::nullopt : std::optional(config.eos_token_ids[0]));
  writer.add("tokenizer.ggml.add_bos_token", false);
}

GgufType float_type(at::ScalarType dtype) {
  if (dtype == at::kHalf) return GgufType::kF16;
  return dtype == at::kBFloat16 ? GgufType::kBF16 : GgufType::kF32;
}

at::ScalarType dtype_of(GgufType type) {
  if (type == GgufType::kF16) return at::kHalf;
  return type == GgufType::kBF16 ? at::kBFloat16 : at::kFloat;
}

// Adds the tensors of a model to a GGUF file under their names there.
class TensorAdder {
 public:
  TensorAdder(GgufWriter& writer, const GPT2Config& config, const TensorStore& store,
              const std::map<std::string, CodedLinear>& replaced)
      : writer_(writer), config_(config), tensors_(store), replaced_(replaced) {}

  void add_all() {
    const int64_t width = config_.n_embd;
    add_float("token_embd.weight", tensors_.raw("transformer.wte.weight", {config_.vocab_size, width}));
    add_float("position_embd.weight", tensors_.raw("transformer.wpe.weight", {config_.n_positions, width}));
    for (int64_t layer = 0; layer < config_.n_layer; ++layer) add_block(std::to_string(layer));
    add_layer_norm("output_norm", "transformer.ln_f");
    add_head();
  }

  // The type that most of the quantized weights have, as llama.cpp numbers it.
  uint32_t file_type() const {
    const auto most = std::max_element(counts_.begin(), counts_.end(),
                                       [](const auto& a, const auto& b) { return a.second < b.second; });
    const GgufType type = most == counts_.end() ? GgufType::kF32 : most->first;
    switch (type) {
      case GgufType::kQ4_0:
        return 2;
      case GgufType::kQ4_1:
        return 3;
      case GgufType::kQ8_0:
        return 7;
      default:
        return 0;
    }
  }

 private:
  void add_block(const std::string& layer) {
    const int64_t width = config_.n_embd;
    const std::string to = "blk." + layer + ".";
    const std::string from = "transformer.h." + layer + ".";
    add_layer_norm(to + "attn_norm", from + "ln_1");
    add_linear(to + "attn_qkv", from + "attn.c_attn", {width, 3 * width});
    add_linear(to + "attn_output", from + "attn.c_proj", {width, width});
    add_layer_norm(to + "ffn_norm", from + "ln_2");
    add_linear(to + "ffn_up", from + "mlp.c_fc", {width, config_.n_inner});
    add_linear(to + "ffn_down", from + "mlp.c_proj", {config_.n_inner, width});
  }

  // llama.cpp adds and multiplies vectors as f32 only.
  void add_vector(const std::string& name, const at::Tensor& tensor) { add_float(name, tensor.to(at::kFloat)); }

  void add_layer_norm(const std::string& name, const std::string& path) {
    for (const char* leaf : {".weight", ".bias"}) {
      add_vector(name + leaf, tensors_.raw(path + leaf, {config_.n_embd}));
    }
  }

  void add_linear(const std::string& name, const std::string& path, LinearShape shape) {
    const auto found = replaced_.find(path);
    if (found == replaced_.end()) {
      add_float(name + ".weight", tensors_.raw(path + ".weight", {shape.k, shape.n}).t());
    } else {
      add_quantized(name + ".weight", path, found->second.weight);
    }
    const bool has_new_bias = found != replaced_.end() && found->second.bias;
    add_vector(name + ".bias", has_new_bias ? *found->second.bias : tensors_.raw(path + ".bias", {shape.n}));
  }

  // Without a weight of its own llama.cpp takes the embedding.
  void add_head() {
    const auto found = replaced_.find("lm_head");
    if (found != replaced_.end()) return add_quantized("output.weight", "lm_head", found->second.weight);
    if (config_.tie_word_embeddings && !tensors_.contains("lm_head.weight")) return;
    const std::array shape = {config_.vocab_size, config_.n_embd};
    const at::Tensor weight = tensors_.raw("lm_head.weight", shape);
    const at::Tensor embedding = tensors_.raw("transformer.wte.weight", shape);
    const bool is_tied = config_.tie_word_embeddings && weight.to(at::kFloat).equal(embedding.to(at::kFloat));
    if (!is_tied) add_float("output.weight", weight);
  }

  void add_float(const std::string& name, const at::Tensor& tensor) {
    const GgufType type = float_type(tensor.scalar_type());
    writer_.add_tensor(name, type, tensor.sizes().vec(), [tensor, type](const GgufWriter::Sink& sink) {
      const at::Tensor held = tensor.to(dtype_of(type)).contiguous();
      sink(held.const_data_ptr(), held.nbytes());
    });
  }

  void add_quantized(const std::string& name, const std::string& path, const CodedWeight& weight) {
    const GgufType type = gguf_type_of(weight, path);
    ++counts_[type];
    writer_.add_tensor(name, type, weight.codes.sizes().vec(), [weight, type, path](const GgufWriter::Sink& sink) {
      const at::Tensor blocks = gguf_blocks(weight, type, path);
      sink(blocks.const_data_ptr(), blocks.nbytes());
    });
  }

  GgufWriter& writer_;
  const GPT2Config& config_;
  GPT2Tensors tensors_;
  const std::map<std::string, CodedLinear>& replaced_;
  std::map<GgufType, int64_t> counts_;
};

}  // namespace

void check_gguf_model(const std::string& source, const std::string& tokenizer) {
  const std::string path = config_path(source);
  const auto config = GPT2Config::read(path);
  check_config(config, path);
  read_tokenizer(config, tokenizer);
}

void save_gguf(const std::string& source, const std::string& tokenizer, const std::string& out,
               const std::map<std::string, CodedLinear>& replaced) {
  const std::string path = config_path(source);
  const auto config = GPT2Config::read(path);
  check_config(config, path);
  GgufWriter writer;
  add_architecture(writer, config);
  add_tokenizer(writer, read_tokenizer(config, tokenizer), config);
  const TensorStore store = TensorStore::open(source);
  TensorAdder adder(writer, config, store, replaced);
  adder.add_all();
  writer.add("general.file_type", adder.file_type());
  writer.add("general.quantization_version", kQuantizationVersion);
  writer.write(out);
}

void convert_to_gguf(const std::string& in, const std::string& out) {
  const LoadedModel model = load_model(in);  // every check
  TORCH_CHECK(model.kind == ModelKind::kHuggingFace, in, ": must be a Hugging Face folder, is a TorchScript file");
  std::map<std::string, CodedLinear> linears;
  for (auto& [path, weight] : read_coded_linears(TensorStore::open(in), *model.config)) {
    linears[path].weight = std::move(weight);
  }
  TORCH_CHECK(!linears.empty(), in, ": must be a quantized model, has no quantized linear");
  save_gguf(in, in, out, linears);
}

}  // namespace gptq
