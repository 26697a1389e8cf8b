#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>

#include "model/aoti_package.h"
#include "model/atomic_output.h"
#include "model/calibration.h"
#include "model/compressed_tensors_format.h"
#include "model/gguf_blocks.h"
#include "model/gguf_gpt2.h"
#include "model/gptq_format.h"
#include "model/model_card.h"
#include "model/output_error.h"
#include "model/safetensors.h"
#include "rewrite/placement.h"
#include "tools/commands.h"
#include "tools/device.h"
#include "tools/model_input.h"
#include "tools/progress.h"
#include "tools/quantize_card.h"
#include "tools/quantize_flags.h"
#include "tools/report.h"

namespace gptq::tools {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kDefaultSequenceLength = 512;
/// Calibration windows are stacked up to about this many tokens a call.
constexpr int64_t kTokensPerCall = 2048;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Bytes of one weight in the checkpoint, or in the module of a TorchScript file.
int64_t stored_element_size(const LoadedModel& model) {
  if (model.kind == ModelKind::kHuggingFace) {
    const TensorStore store = TensorStore::open(model.source);
    for (const std::string& name : store.names()) {
      if (const at::Tensor tensor = store.tensor(name); tensor.is_floating_point() && tensor.dim() == 2) {
        return tensor.element_size();
      }
    }
  }
  for (const at::Tensor& parameter : model.module.parameters()) {
    if (parameter.is_floating_point()) {
      return parameter.element_size();
    }
  }
  return static_cast<int64_t>(sizeof(float));
}

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

std::map<std::string, QuantizedTensors> replaced_tensors(const std::vector<QuantizedLinear>& layers) {
  std::map<std::string, QuantizedTensors> replaced;
  for (const QuantizedLinear& layer : layers) {
    QuantizedTensors& tensors = replaced[layer.name];
    tensors.bits = layer.bits;
    tensors.group_size = layer.group_size;
    tensors.packed = layer.packed;
    tensors.scales = layer.scales;
    tensors.zeros = optional(layer.zeros);
    tensors.input_order = optional(layer.input_order);
    tensors.bias = optional(layer.bias);
  }
  return replaced;
}

/// Whether a file is read as tensors, each a batch of inputs, and not as text.
bool holds_batches(const std::string& path) {
  return path.ends_with(".safetensors");
}

/// What the models are scored on: a text's tokens or batches of inputs; neither: they are not.
struct Scored {
  std::vector<int64_t> ids;
  std::vector<at::Tensor> batches;

  bool empty() const { return ids.empty() && batches.empty(); }
};

std::map<std::string, CodedLinear> coded_linears(const std::vector<QuantizedLinear>& layers,
                                                 const std::map<std::string, QuantizedTensors>& replaced) {
  std::map<std::string, CodedLinear> linears;
  for (const QuantizedLinear& layer : layers) {
    const QuantizedTensors& tensors = replaced.at(layer.name);
    linears[layer.name] = {unpack_weight(tensors, layer.out_features, layer.in_features), tensors.bias};
  }
  return linears;
}

// A name with a character that means something to YAML or Markdown would garble the card.
CLI::Validator hub_name_check() {
  return {[](std::string& name) { return is_hub_name(name) ? std::string() : "must be OWNER/NAME, got " + name; },
          "OWNER/NAME"};
}

struct QuantizeCommand {
  ModelInput input;
  WindowInput windows;
  QuantizeFlags flags;
  std::string output;
  std::string format = "libgptq";
  std::string base_model;
  std::string calibration;
  std::string eval;
  std::string json;
  std::string device = "cpu";
  std::string compute = "exact";
  int64_t samples = 128;
  int64_t sequence_length = 0;
  uint64_t seed = 0;

  void run();

 private:
  bool uses_calibration() const { return flags.options.quantize.mode != "rtn"; }
  bool reads_text() const;
  int64_t calibration_length(const LoadedModel& model) const;
  std::vector<std::vector<c10::IValue>> calibration_inputs(const LoadedModel& model,
                                                           const std::optional<Tokenizer>& tokenizer) const;
  Scored read_eval(const LoadedModel& model, const std::optional<Tokenizer>& tokenizer) const;
  void score(const LoadedModel& model, const torch::jit::Module& quantized, const Scored& scored, at::Device target,
             QuantizeSummary& summary) const;
  void check_format(const LoadedModel& model, const std::vector<LinearInfo>& linears) const;
  void check_linear(const LinearInfo& linear) const;
  std::string tokenizer_folder(const LoadedModel& model) const;
  Json settings() const;
  CheckpointFormat checkpoint_format() const { return format_named(format).value(); }
  CardSettings card_settings(const LoadedModel& model, CheckpointFormat stored) const;
  void save(const LoadedModel& model, const torch::jit::Module& quantized, const QuantizeSummary& summary) const;
};

bool QuantizeCommand::reads_text() const {
  const auto is_text = [](const std::string& path) { return !path.empty() && !holds_batches(path); };
  return (uses_calibration() && is_text(calibration)) || is_text(eval);
}

int64_t QuantizeCommand::calibration_length(const LoadedModel& model) const {
  const int64_t context = model.context_length.value_or(kDefaultSequenceLength);
  const int64_t length = sequence_length > 0 ? sequence_length : std::min(kDefaultSequenceLength, context);
  TORCH_CHECK(!model.context_length || length <= context, "--sequence-length: must be at most ", context,
              ", the model's context, got ", length);
  return length;
}

std::vector<std::vector<c10::IValue>> QuantizeCommand::calibration_inputs(
    const LoadedModel& model, const std::optional<Tokenizer>& tokenizer) const {
  std::vector<std::vector<c10::IValue>> inputs;
  if (!uses_calibration()) {
    return inputs;
  }
  TORCH_CHECK(!calibration.empty(), "--calibration: must name a file in mode ", flags.options.quantize.mode);
  if (holds_batches(calibration)) {
    for (const at::Tensor& batch : read_batches(calibration)) {
      inputs.push_back({batch});
    }
    return inputs;
  }
  const int64_t length = calibration_length(model);
  const at::Tensor drawn = draw_windows(read_tokens(calibration, *tokenizer, "calibration"), samples, length, seed);
  for (const at::Tensor& batch : drawn.split(std::max<int64_t>(1, kTokensPerCall / length))) {
    inputs.push_back({batch});
  }
  return inputs;
}

Scored QuantizeCommand::read_eval(const LoadedModel& model, const std::optional<Tokenizer>& tokenizer) const {
  if (eval.empty()) {
    return {};
  }
  return holds_batches(eval) ? Scored{{}, read_batches(eval)} : Scored{windows.read(eval, model, *tokenizer), {}};
}

void QuantizeCommand::score(const LoadedModel& model, const torch::jit::Module& quantized, const Scored& scored,
                            at::Device target, QuantizeSummary& summary) const {
  const auto start = Clock::now();
  QuantizeModuleOptions rounding = flags.options;
  rounding.quantize_layer = [&](const std::string& name) {
    QuantizeOptions nearest = flags.options.quantize_layer(name);
    nearest.mode = "rtn";
    nearest.scale_search = "minmax";
    nearest.act_order = "off";
    return nearest;
  };
  rounding.quantize.mode = "rtn";
  rounding.progress = {};
  const torch::jit::Module rounded = quantize_module(model.module, {}, rounding).module;
  set_linear_compute(rounded, compute);
  std::vector<torch::jit::Module> models{model.module, rounded, quantized};
  if (!target.is_cpu()) {
    std::transform(models.begin(), models.end(), models.begin(),
                   [&](const torch::jit::Module& module) { return rewrite::copy_to(module, target); });
  }
  Progress progress("scoring");
  const char* unit = scored.batches.empty() ? "windows" : "batches";
  const EvaluationProgress update = [&](int64_t done, int64_t total) { progress.update(done, total, unit); };
  if (scored.batches.empty()) {
    summary.windows = windows.resolve(model);
    summary.evaluations = evaluate(models, scored.ids, *summary.windows, update);
  } else {
    summary.output_errors = output_errors(models[0], {models[1], models[2]}, scored.batches, update);
  }
  summary.seconds_evaluate = seconds_since(start);
}

void QuantizeCommand::save(const LoadedModel& model, const torch::jit::Module& quantized,
                           const QuantizeSummary& summary) const {
  if (model.kind == ModelKind::kTorchScript) {
    save_torchscript(quantized, output);
    return;
  }
  const std::map<std::string, QuantizedTensors> replaced = replaced_tensors(summary.layers);
  if (format == "gguf") {
    save_gguf(model.source, tokenizer_folder(model), output, coded_linears(summary.layers, replaced));
    return;
  }
  const CheckpointFormat stored = checkpoint_format();
  const std::string card = model_card(summary, card_settings(model, stored));
  if (stored == CheckpointFormat::kLibgptq) {
    save_checkpoint(model.source, output, replaced, settings(), card);
    return;
  }
  Json meta = settings();
  meta["quantizer"] = {"libgptq:" GPTQ_VERSION};
  save_coded_checkpoint(model.source, output, stored, coded_linears(summary.layers, replaced), meta, card);
}

Json QuantizeCommand::settings() const {
  const QuantizeOptions& used = flags.options.quantize;
  return {{"compute", compute},
          {"sym", used.symmetric},
          {"per_tensor", used.per_tensor},
          {"mode", used.mode},
          {"act_order", used.act_order},
          {"damping", used.damping},
          {"target_alpha", used.target_alpha},
          {"scale_search", used.scale_search},
          {"refine_sweeps", used.refine_sweeps},
          {"row_guard", used.row_guard},
          {"correct_bias", used.correct_bias},
          {"search_damping", used.search_damping},
          {"calibration", {{"samples", samples}, {"seed", seed}}}};
}

CardSettings QuantizeCommand::card_settings(const LoadedModel& model, CheckpointFormat stored) const {
  CardSettings card;
  card.format = stored;
  card.source = model.source;
  card.base_model = base_model.empty() ? hub_name(model.source).value_or("") : base_model;
  card.options = flags.options.quantize;
  if (flags.options.quantize.mode != "rtn") {
    card.calibration = calibration;
    card.samples = samples;
    card.sequence_length = calibration_length(model);
    card.seed = seed;
  }
  card.eval = eval;
  return card;
}

// Before the long work.
void QuantizeCommand::check_format(const LoadedModel& model, const std::vector<LinearInfo>& linears) const {
  const bool is_folder = model.kind == ModelKind::kHuggingFace;
  TORCH_CHECK(!is_folder || !model.config->quantization ||
                  (model.config->quantization->format == CheckpointFormat::kLibgptq && format == "libgptq"),
              input.model,
              ": must be a float model or, with --format libgptq, one in that format (gptq convert makes it)");
  if (format == "libgptq") {
    return;
  }
  TORCH_CHECK(compute == "exact", "--compute: must be exact with --format ", format,
              ", which does not say how its reader computes, got ", compute);
  TORCH_CHECK(is_folder, "--format: must be libgptq for a TorchScript file, got ", format);
  if (format == "gguf") {
    check_gguf_model(model.source, tokenizer_folder(model));
  }
  for (const LinearInfo& linear : linears) {
    if (!flags.options.skip(linear.name)) {
      check_linear(linear);
    }
  }
}

// That the format can hold what the settings make of the linear.
void QuantizeCommand::check_linear(const LinearInfo& linear) const {
  const QuantizeOptions used = flags.options.quantize_layer(linear.name);
  const int64_t group_size = used.per_tensor ? -1 : used.group_size;
  if (format == "gguf") {
    check_gguf_fits(linear.name, used.bits, group_size, linear.in_features);
    // What such weights come to is known only after the long work, and among thousands of groups one never fits.
    TORCH_CHECK(used.symmetric, linear.name,
                ": must be symmetric with --format gguf, where the minimum of a group is an f16, is asymmetric");
    TORCH_CHECK(used.act_order != "dynamic" || group_size == -1 || group_size >= linear.in_features, linear.name,
                ": act-order must be auto, static or off with --format gguf, where a group is of columns side by side, "
                "got dynamic");
  } else if (format == "gptq") {
    check_gptq_fits(linear.name, used.bits, group_size, linear.out_features, linear.in_features);
  } else {
    check_compressed_tensors_fits(linear.name, used.bits, group_size, linear.in_features);
    TORCH_CHECK(used.act_order != "dynamic" || group_size == -1,
                "--act-order: must not be dynamic with --format compressed-tensors, which has dropped weight_g_idx; "
                "static needs none");
  }
}

std::string QuantizeCommand::tokenizer_folder(const LoadedModel& model) const {
  return input.tokenizer.empty() ? model.source : input.tokenizer;
}

void QuantizeCommand::run() {
  const auto start = Clock::now();
  if (format != "gguf" && checkpoint_format() != CheckpointFormat::kLibgptq) {
    flags.keep_head(format);
  }
  TORCH_CHECK(!is_pt2_archive(input.model), input.model,
              ": must not be compiled or exported; quantize the model it was made from, then export that");
  const at::Device target = open_device(device);
  if (!target.is_cpu()) {
    flags.options.device = target;
  }
  const LoadedModel model = input.load();
  const std::vector<LinearInfo> linears = find_linears(model.module);
  flags.resolve(linears);
  if (format == "gguf") {
    check_output_file(output);
  } else if (model.kind == ModelKind::kHuggingFace) {
    check_output_folder(output);
  }
  check_format(model, linears);
  JsonOutput report(json);
  const auto tokenizer = reads_text() ? std::optional(input.load_tokenizer()) : std::nullopt;
  const auto inputs = calibration_inputs(model, tokenizer);
  const Scored scored = read_eval(model, tokenizer);

  QuantizeSummary summary;
  const auto quantize_start = Clock::now();
  QuantizedModule quantized;
  {
    Progress progress("quantizing");
    flags.options.progress = [&](const QuantizedLinear& layer, size_t done, size_t total) {
      char loss[64];
      std::snprintf(loss, sizeof(loss), "  loss %.4g (nearest %.4g)", layer.report.loss, layer.report.rtn_loss);
      progress.update(done, total, layer.name + loss);
    };
    quantized = quantize_module(model.module, inputs, flags.options);
  }
  TORCH_CHECK(!quantized.layers.empty(), input.model, ": has no float linear to quantize");
  set_linear_compute(quantized.module, compute);
  summary.seconds_quantize = seconds_since(quantize_start);
  summary.device = target.str();
  summary.device_peak_bytes = peak_bytes(target);
  if (!scored.empty()) {
    score(model, quantized.module, scored, target, summary);
  }
  const int64_t bytes_per_float = stored_element_size(model);
  for (const QuantizedLinear& layer : quantized.layers) {
    // The weight of a tied head stays, as the embedding.
    summary.linear_bytes_before += layer.embedding ? 0 : layer.out_features * layer.in_features * bytes_per_float;
    summary.linear_bytes_after += layer.bytes();
  }
  summary.layers = std::move(quantized.layers);
  save(model, quantized.module, summary);
  summary.seconds_total = seconds_since(start);
  report.write(to_json(summary));
  print_summary(summary);
}

}  // namespace

void add_quantize_command(CLI::App& app) {
  const auto command = std::make_shared<QuantizeCommand>();
  CLI::App* sub = app.add_subcommand("quantize", "Quantize a model's linears with GPTQ");
  command->input.add_to(*sub);
  sub->add_option("-o,--output", command->output, "Folder (or TorchScript or GGUF file) to write the result to")
      ->required();
  sub->add_option("--format", command->format,
                  "libgptq; gguf: a file for llama.cpp, with 4 or 8 bits, symmetric; or, which keep lm_head, gptq: the "
                  "checkpoint "
                  "format of GPTQModel, AutoGPTQ and transformers, or compressed-tensors: its pack-quantized, of vLLM")
      ->capture_default_str()
      ->check(CLI::IsMember({"libgptq", "gptq", "compressed-tensors", "gguf"}));
  sub->add_option("--calibration", command->calibration,
                  "Text to gather the Hessians on, or FILE.safetensors: each tensor in it a batch that the model is "
                  "called with");
  sub->add_option("--samples", command->samples, "Calibration windows, drawn from the whole text")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  sub->add_option("--sequence-length", command->sequence_length, "Tokens per calibration window")
      ->default_str("512, at most the model's context")
      ->check(CLI::PositiveNumber);
  sub->add_option("--seed", command->seed, "Seed of the draw")->capture_default_str();
  command->flags.add_to(*sub);
  sub->add_option("--eval", command->eval,
                  "Text to score before and after, or FILE.safetensors to compare the outputs on");
  command->windows.add_to(*sub);
  sub->add_option(
         "--base-model", command->base_model,
         "Name of the model on the Hugging Face hub, for the model card; default: that of a folder in the hub's "
         "cache")
      ->check(hub_name_check());
  add_device_option(*sub, command->device);
  add_compute_option(*sub, command->compute);
  sub->add_option("--json", command->json, "File to write the report to");
  sub->callback([command] { command->run(); });
}

}  // namespace gptq::tools
