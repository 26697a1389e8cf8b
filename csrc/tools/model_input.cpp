#include "tools/model_input.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <filesystem>
#include <fstream>
#include <iterator>

namespace gptq::tools {

void ModelInput::add_to(CLI::App& command) {
  command
      .add_option("MODEL", model, "Hugging Face folder (float or quantized), TorchScript file or AOTInductor package")
      ->required();
  command.add_option("--tokenizer", tokenizer, "Folder with tokenizer.json or vocab.json and merges.txt")
      ->default_str("the model's folder");
  command.add_option("--threads", threads, "Threads to compute with")
      ->default_str("all cores")
      ->check(CLI::PositiveNumber);
}

LoadedModel ModelInput::load() const {
  if (threads > 0) {
    at::set_num_threads(static_cast<int>(threads));
  }
  return load_model(model);
}

Tokenizer ModelInput::load_tokenizer() const {
  if (!tokenizer.empty()) {
    return Tokenizer::load(tokenizer);
  }
  TORCH_CHECK(std::filesystem::is_directory(model), "--tokenizer: must name a folder with tokenizer files, since ",
              model, " is no folder");
  return Tokenizer::load(model);
}

void WindowInput::add_to(CLI::App& command) {
  command.add_option("--window", window, "Tokens the model is called with at a time")
      ->default_str("the model's context")
      ->check(CLI::PositiveNumber);
  command.add_option("--stride", stride, "Tokens from one window's start to the next")
      ->default_str("the window: no overlap")
      ->check(CLI::PositiveNumber);
  command.add_option("--max-tokens", max_tokens, "Score only the first tokens of the text")
      ->default_str("the whole text")
      ->check(CLI::PositiveNumber);
}

std::vector<int64_t> WindowInput::read(const std::string& path, const LoadedModel& model,
                                       const Tokenizer& tokenizer) const {
  std::vector<int64_t> ids = read_tokens(path, tokenizer, "evaluation");
  if (max_tokens > 0 && ids.size() > static_cast<size_t>(max_tokens)) {
    ids.resize(static_cast<size_t>(max_tokens));
  }
  check_evaluation(ids, resolve(model));
  return ids;
}

EvaluationOptions WindowInput::resolve(const LoadedModel& model) const {
  TORCH_CHECK(window > 0 || model.context_length, "--window: must be given, since ", model.source,
              " does not tell its context length");
  EvaluationOptions options;
  options.window = window > 0 ? window : *model.context_length;
  options.stride = stride;
  TORCH_CHECK(!model.context_length || options.window <= *model.context_length, "--window: must be at most ",
              *model.context_length, ", the model's context, got ", options.window);
  return options;
}

std::vector<int64_t> read_tokens(const std::string& path, const Tokenizer& tokenizer, const std::string& role) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file && !std::filesystem::is_directory(path), path, ": the ", role, " text cannot be read");
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  TORCH_CHECK(!file.bad(), path, ": the ", role, " text cannot be read");
  TORCH_CHECK(!text.empty(), path, ": the ", role, " text is empty");
  return tokenizer.encode(text);
}

}  // namespace gptq::tools
