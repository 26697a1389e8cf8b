#include "model/gpt2.h"

#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/script.h>

#include <cstdio>
#include <sstream>

#include "model/quantized_linear.h"
#include "rewrite/packed_weight.h"

namespace gptq {

namespace {

using torch::jit::Module;

// Lets the source say gptq.linear_w4(...): torch's own resolver knows torch.* only.
struct Resolver : public torch::jit::Resolver {
  std::shared_ptr<torch::jit::SugaredValue> resolveValue(const std::string& name, torch::jit::GraphFunction&,
                                                         const torch::jit::SourceRange&) override {
    if (name == "torch") return std::make_shared<torch::jit::BuiltinModule>("aten");
    if (name == "gptq") return std::make_shared<torch::jit::BuiltinModule>("gptq");
    return nullptr;
  }
};

// A float literal of TorchScript that reads back as the same double.
std::string literal(double value) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.17e", value);
  return text;
}

class Builder {
 public:
  Builder(const GPT2Config& config, const TensorStore& store)
      : config_(config),
        tensors_(store),
        unit_(std::make_shared<torch::jit::CompilationUnit>()),
        resolver_(std::make_shared<Resolver>()) {}

  Module build() {
    Module root = new_module("model");
    const Module transformer = build_transformer();
    root.register_module("transformer", transformer);
    root.register_module("lm_head", build_head(transformer.attr("wte").toModule().attr("weight").toTensor()));
    tensors_.check_all_used();
    root.define(R"(
def forward(self, input_ids: Tensor, past: Optional[List[Tensor]] = None) -> Tuple[Tensor, List[Tensor]]:
    x, present = self.transformer.forward(input_ids, past)
    return self.lm_head.forward(x), present
)",
                resolver_);
    return root;
  }

 private:
  // Every module has a type of its own, named after its path.
  Module new_module(const std::string& path) const {
    std::string name = "__torch__.gptq.gpt2." + path;
    for (size_t i = sizeof("__torch__.gptq.gpt2.") - 1; i < name.size(); ++i) {
      if (name[i] == '.') name[i] = '_';
    }
    Module module{c10::QualifiedName(name), unit_};
    module.register_attribute("training", c10::BoolType::get(), false);
    return module;
  }

  static void add_weight(Module& module, const char* name, const at::Tensor& tensor) {
    module.register_parameter(name, tensor, /*is_buffer=*/false);
  }

  Module build_embedding(const std::string& path, int64_t rows) {
    Module module = new_module(path);
    add_weight(module, "weight", tensors_.floats(path + ".weight", {rows, config_.n_embd}));
    module.define(R"(
def forward(self, ids: Tensor) -> Tensor:
    return torch.embedding(self.weight, ids)
)",
                  resolver_);
    return module;
  }

  Module build_layer_norm(const std::string& path) {
    const int64_t size = config_.n_embd;
    Module module = new_module(path);
    add_weight(module, "weight", tensors_.floats(path + ".weight", {size}));
    add_weight(module, "bias", tensors_.floats(path + ".bias", {size}));
    module.define("def forward(self, x: Tensor) -> Tensor:\n    return torch.layer_norm(x, [" + std::to_string(size) +
                      "], self.weight, self.bias, " + literal(config_.layer_norm_epsilon) + ")\n",
                  resolver_);
    return module;
  }

  // The linear y[M,N] = x[M,K] wᵀ + b from its quantized weight.
  Module build_packed_linear(const std::string& path, int64_t k, int64_t n, bool has_bias) {
    const QuantizedTensors weight = read_quantized_linear(tensors_, config_.quantization, path, {k, n});
    Module module = new_module(path);
    module.register_buffer("packed", weight.packed);
    module.register_buffer("scales", weight.scales);
    if (weight.zeros) module.register_buffer("zeros", *weight.zeros);
    if (has_bias) add_weight(module, "bias", tensors_.floats(path + ".bias", {n}));
    if (weight.input_order) module.register_buffer("input_order", *weight.input_order);
    std::ostringstream source;
    source << "def forward(self, x: Tensor) -> Tensor:\n    return gptq.linear_w" << rewrite::packed_bits(weight.bits)
           << "(x, self.packed, self.scales, " << (weight.zeros ? "self.zeros" : "None") << ", "
           << (has_bias ? "self.bias" : "None") << ", " << (weight.input_order ? "self.input_order" : "None") << ", "
           << weight.group_size << ", '" << config_.quantization->compute << "')\n";
    module.define(source.str(), resolver_);
    return module;
  }

  // transformers' Conv1D: the weight is stored [K, N].
  Module build_conv1d(const std::string& path, int64_t k, int64_t n) {
    if (is_quantized_linear(tensors_, path)) return build_packed_linear(path, k, n, true);
    Module module = new_module(path);
    add_weight(module, "weight", tensors_.floats(path + ".weight", {k, n}));
    add_weight(module, "bias", tensors_.floats(path + ".bias", {n}));
    module.define(R"(
def forward(self, x: Tensor) -> Tensor:
    y = torch.addmm(self.bias, torch.reshape(x, [-1, x.size(-1)]), self.weight)
    return torch.view(y, [x.size(0), x.size(1), -1])
)",
                  resolver_);
    return module;
  }

  // Tied to the embedding, unless the checkpoint has a weight of its own: as in transformers, a tied head whose stored
  // weight differs from the embedding keeps its own.
  Module build_head(const at::Tensor& embedding) {
    const std::string path = "lm_head";
    const int64_t k = config_.n_embd;
    const int64_t n = config_.vocab_size;
    if (is_quantized_linear(tensors_, path)) return build_packed_linear(path, k, n, false);
    Module module = new_module(path);
    at::Tensor weight = embedding;
    if (!config_.tie_word_embeddings || tensors_.contains(path + ".weight")) {
      weight = tensors_.floats(path + ".weight", {n, k});
      if (config_.tie_word_embeddings && at::equal(weight, embedding)) weight = embedding;
    }
    add_weight(module, "weight", weight);
    module.define(R"(
def forward(self, x: Tensor) -> Tensor:
    return torch.linear(x, self.weight)
)",
                  resolver_);
    return module;
  }

  Module build_attention(const std::string& path, int64_t layer) {
    Module module = new_module(path);
    module.register_module("c_attn", build_conv1d(path + ".c_attn", config_.n_embd, 3 * config_.n_embd));
    module.register_module("c_proj", build_conv1d(path + ".c_proj", config_.n_embd, config_.n_embd));
    const std::string heads =
        "[x.size(0), x.size(1), " + std::to_string(config_.n_head) + ", " + std::to_string(config_.head_size()) + "]";
    const std::string width = std::to_string(config_.n_embd);
    const std::string key = std::to_string(2 * layer);
    const std::string value = std::to_string(2 * layer + 1);
    module.define(
        "def forward(self, x: Tensor, mask: Optional[Tensor], past: Optional[List[Tensor]]) -> "
        "Tuple[Tensor, Tensor, Tensor]:\n"
        "    q, k, v = torch.split(self.c_attn.forward(x), " +
            width +
            ", 2)\n"
            "    q = torch.transpose(torch.view(q, " +
            heads +
            "), 1, 2)\n"
            "    k = torch.transpose(torch.view(k, " +
            heads +
            "), 1, 2)\n"
            "    v = torch.transpose(torch.view(v, " +
            heads +
            "), 1, 2)\n"
            "    if past is not None:\n"
            "        k = torch.cat([past[" +
            key +
            "], k], 2)\n"
            "        v = torch.cat([past[" +
            value +
            "], v], 2)\n"
            "    y = torch.scaled_dot_product_attention(q, k, v, mask, 0.0, past is None, scale=" +
            literal(config_.attention_scale(layer)) +
            ")\n"
            "    y = torch.reshape(torch.transpose(y, 1, 2), [x.size(0), x.size(1), " +
            width +
            "])\n"
            "    return self.c_proj.forward(y), k, v\n",
        resolver_);
    return module;
  }

  Module build_mlp(const std::string& path) {
    Module module = new_module(path);
    module.register_module("c_fc", build_conv1d(path + ".c_fc", config_.n_embd, config_.n_inner));
    module.register_module("c_proj", build_conv1d(path + ".c_proj", config_.n_inner, config_.n_embd));
    module.define("def forward(self, x: Tensor) -> Tensor:\n    x = self.c_fc.forward(x)\n    x = " +
                      *activation_source(config_.activation_function) + "\n    return self.c_proj.forward(x)\n",
                  resolver_);
    return module;
  }

  Module build_block(const std::string& path, int64_t layer) {
    Module module = new_module(path);
    module.register_module("ln_1", build_layer_norm(path + ".ln_1"));
    module.register_module("attn", build_attention(path + ".attn", layer));
    module.register_module("ln_2", build_layer_norm(path + ".ln_2"));
    module.register_module("mlp", build_mlp(path + ".mlp"));
    module.define(R"(
def forward(self, x: Tensor, mask: Optional[Tensor], past: Optional[List[Tensor]]) -> Tuple[Tensor, Tensor, Tensor]:
    y, k, v = self.attn.forward(self.ln_1.forward(x), mask, past)
    x = y + x
    return x + self.mlp.forward(self.ln_2.forward(x)), k, v
)",
                  resolver_);
    return module;
  }

  Module build_transformer() {
    Module module = new_module("transformer");
    module.register_module("wte", build_embedding("transformer.wte", config_.vocab_size));
    module.register_module("wpe", build_embedding("transformer.wpe", config_.n_positions));
    Module blocks = new_module("transformer.h");
    std::ostringstream calls;
    for (int64_t layer = 0; layer < config_.n_layer; ++layer) {
      const std::string name = std::to_string(layer);
      blocks.register_module(name, build_block("transformer.h." + name, layer));
      calls << "    x, k" << name << ", v" << name << " = getattr(self.h, '" << name << "').forward(x, mask, past)\n";
    }
    module.register_module("h", blocks);
    module.register_module("ln_f", build_layer_norm("transformer.ln_f"));
    module.define(transformer_source(calls.str()), resolver_);
    return module;
  }

  // dtype=11 is bool and 4 int64: the names of dtypes belong to Python's torch.
  std::string transformer_source(const std::string& calls) const {
    std::ostringstream source;
    source << R"(
def forward(self, input_ids: Tensor, past: Optional[List[Tensor]]) -> Tuple[Tensor, List[Tensor]]:
    start = 0
    mask: Optional[Tensor] = None
    length = input_ids.size(1)
    if past is not None:
        start = past[0].size(2)
        mask = torch.tril(torch.ones([length, start + length], dtype=11, device=input_ids.device), start)
    positions = torch.arange(start, start + length, dtype=4, device=input_ids.device)
    x = self.wte.forward(input_ids) + self.wpe.forward(positions)
)" << calls << "    return self.ln_f.forward(x), [";
    for (int64_t layer = 0; layer < config_.n_layer; ++layer) {
      source << (layer > 0 ? ", k" : "k") << layer << ", v" << layer;
    }
    source << "]\n";
    return source.str();
  }

  const GPT2Config& config_;
  GPT2Tensors tensors_;
  std::shared_ptr<torch::jit::CompilationUnit> unit_;
  std::shared_ptr<Resolver> resolver_;
};

}  // namespace

Module build_gpt2(const GPT2Config& config, const TensorStore& store) {
  return Builder(config, store).build();
}

}  // namespace gptq
