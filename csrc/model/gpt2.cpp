#include "model/gpt2.h"

#include <torch/csrc/jit/frontend/resolver.h>
#include <torch/script.h>

#include <cmath>
#include <cstdio>
#include <set>
#include <sstream>

#include "model/json_file.h"

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

std::string shape_text(at::IntArrayRef shape) {
  return c10::str(shape);
}

// The tensors of a checkpoint under their canonical names; keeps account of those that were asked for.
class Checkpoint {
 public:
  explicit Checkpoint(const TensorStore& store) : store_(store) {
    for (const auto& name : store.names()) {
      const auto [found, is_new] = names_.emplace(canonical_gpt2_name(name), name);
      TORCH_CHECK(is_new, store.path(), ": tensor ", show(name), " is there twice, also as ", show(found->second));
    }
  }

  bool contains(const std::string& name) const { return names_.count(name) > 0; }

  // A floating tensor of this shape as f32, checked to be finite.
  at::Tensor floats(const std::string& name, at::IntArrayRef shape) {
    const at::Tensor tensor = raw(name, shape);
    TORCH_CHECK(tensor.is_floating_point(), where(name), "must be floating point, got ", tensor.dtype().name());
    const at::Tensor result = tensor.to(at::kFloat);
    check_finite(name, result);
    return result;
  }

  at::Tensor typed(const std::string& name, at::ScalarType dtype, at::IntArrayRef shape) {
    const at::Tensor tensor = raw(name, shape);
    TORCH_CHECK(tensor.scalar_type() == dtype, where(name), "must be ", dtype, ", got ", tensor.scalar_type());
    if (tensor.is_floating_point()) check_finite(name, tensor);
    return tensor;
  }

  // That the file holds nothing the model has no place for: it would be another model.
  void check_all_used() const {
    for (const auto& [name, stored] : names_) {
      TORCH_CHECK(used_.count(name) > 0 || is_ignored_gpt2_tensor(name), where(name),
                  "is not part of the model that config.json describes");
    }
  }

 private:
  std::string where(const std::string& name) const {
    const std::string& stored = names_.at(name);
    return store_.path(stored) + ": tensor " + show(stored) + " ";
  }

  at::Tensor raw(const std::string& name, at::IntArrayRef shape) {
    TORCH_CHECK(contains(name), store_.path(), ": tensor ", show(name), " of shape ", shape_text(shape), " is missing");
    used_.insert(name);
    const at::Tensor tensor = store_.tensor(names_.at(name));
    TORCH_CHECK(tensor.sizes() == shape, where(name), "must have shape ", shape_text(shape),
                ", which config.json asks for, got ", shape_text(tensor.sizes()));
    return tensor;
  }

  void check_finite(const std::string& name, const at::Tensor& tensor) const {
    const auto [low, high] = at::aminmax(tensor.to(at::kFloat));
    if (std::isfinite(low.item<float>()) && std::isfinite(high.item<float>())) return;
    const int64_t index = at::isfinite(tensor).flatten().logical_not().to(at::kByte).argmax().item<int64_t>();
    TORCH_CHECK(false, where(name), "must be finite, element ", index, " is ", tensor.flatten()[index].item<double>());
  }

  const TensorStore& store_;
  std::map<std::string, std::string> names_;
  std::set<std::string> used_;
};

class Builder {
 public:
  Builder(const GPT2Config& config, const TensorStore& store)
      : config_(config),
        checkpoint_(store),
        unit_(std::make_shared<torch::jit::CompilationUnit>()),
        resolver_(std::make_shared<Resolver>()) {}

  Module build() {
    Module root = new_module("model");
    const Module transformer = build_transformer();
    root.register_module("transformer", transformer);
    root.register_module("lm_head", build_head(transformer.attr("wte").toModule().attr("weight").toTensor()));
    checkpoint_.check_all_used();
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
    add_weight(module, "weight", checkpoint_.floats(path + ".weight", {rows, config_.n_embd}));
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
    add_weight(module, "weight", checkpoint_.floats(path + ".weight", {size}));
    add_weight(module, "bias", checkpoint_.floats(path + ".bias", {size}));
    module.define("def forward(self, x: Tensor) -> Tensor:\n    return torch.layer_norm(x, [" + std::to_string(size) +
                      "], self.weight, self.bias, " + literal(config_.layer_norm_epsilon) + ")\n",
                  resolver_);
    return module;
  }

  // The linear y[M,N] = x[M,K] wᵀ + b from its packed weight.
  Module build_packed_linear(const std::string& path, int64_t k, int64_t n, bool has_bias) {
    TORCH_CHECK(config_.quantization, "config.json: quantization_config must be there, since ", show(path + ".packed"),
                " is in the checkpoint");
    const auto [bits, stored_group_size] = config_.quantization->of(path);
    const bool split = bits > 4;  // two planes of 4 bits, see split_w8
    const int64_t group_size = split && stored_group_size == -1 ? k : stored_group_size;
    TORCH_CHECK(!split || k % group_size == 0, "config.json: quantization_config: group_size of ", show(path),
                " must divide its ", k, " inputs, since it is packed with ", bits, " bits, got ", group_size);
    const int64_t width = split ? 2 * k : k;
    const int64_t groups = group_size == -1 ? 1 : (width - 1) / group_size + 1;
    Module module = new_module(path);
    module.register_buffer("packed",
                           checkpoint_.typed(path + ".packed", at::kByte, {(n + 15) / 16, (width + 7) / 8, 64}));
    module.register_buffer("scales", checkpoint_.typed(path + ".scales", at::kHalf, {groups, n}));
    const bool has_zeros = checkpoint_.contains(path + ".zeros");
    if (has_zeros) module.register_buffer("zeros", checkpoint_.typed(path + ".zeros", at::kByte, {groups, n}));
    if (has_bias) add_weight(module, "bias", checkpoint_.floats(path + ".bias", {n}));
    const bool has_order = checkpoint_.contains(path + ".input_order");
    if (has_order) module.register_buffer("input_order", checkpoint_.typed(path + ".input_order", at::kInt, {width}));
    std::ostringstream source;
    source << "def forward(self, x: Tensor) -> Tensor:\n    return gptq.linear_w4("
           << (split ? "torch.cat([x, x], -1)" : "x") << ", self.packed, self.scales, "
           << (has_zeros ? "self.zeros" : "None") << ", " << (has_bias ? "self.bias" : "None") << ", "
           << (has_order ? "self.input_order" : "None") << ", " << group_size << ", 'exact')\n";
    module.define(source.str(), resolver_);
    return module;
  }

  // transformers' Conv1D: the weight is stored [K, N].
  Module build_conv1d(const std::string& path, int64_t k, int64_t n) {
    if (checkpoint_.contains(path + ".packed")) return build_packed_linear(path, k, n, true);
    Module module = new_module(path);
    add_weight(module, "weight", checkpoint_.floats(path + ".weight", {k, n}));
    add_weight(module, "bias", checkpoint_.floats(path + ".bias", {n}));
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
    if (checkpoint_.contains(path + ".packed")) return build_packed_linear(path, k, n, false);
    Module module = new_module(path);
    at::Tensor weight = embedding;
    if (!config_.tie_word_embeddings || checkpoint_.contains(path + ".weight")) {
      weight = checkpoint_.floats(path + ".weight", {n, k});
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
  Checkpoint checkpoint_;
  std::shared_ptr<torch::jit::CompilationUnit> unit_;
  std::shared_ptr<Resolver> resolver_;
};

}  // namespace

std::string canonical_gpt2_name(const std::string& name) {
  const bool has_place = name.starts_with("transformer.") || name.starts_with("lm_head.");
  return has_place ? name : "transformer." + name;
}

bool is_ignored_gpt2_tensor(const std::string& canonical) {
  return canonical.ends_with(".attn.bias") || canonical.ends_with(".attn.masked_bias");
}

Module build_gpt2(const GPT2Config& config, const TensorStore& store) {
  return Builder(config, store).build();
}

}  // namespace gptq
