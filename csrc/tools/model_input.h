#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "model/checkpoint.h"
#include "model/perplexity.h"
#include "model/tokenizer.h"

namespace gptq::tools {

/// The model and tokenizer that a subcommand works on.
struct ModelInput {
  std::string model;
  std::string tokenizer;  ///< folder; empty: the model's own
  int64_t threads = 0;

  /// Adds MODEL, --tokenizer and --threads.
  void add_to(CLI::App& command);
  LoadedModel load() const;
  Tokenizer load_tokenizer() const;
};

/// How a text is cut into windows for scoring.
struct WindowInput {
  int64_t window = 0;      ///< 0: as long as the model's context
  int64_t stride = 0;      ///< 0: window
  int64_t max_tokens = 0;  ///< 0: the whole text

  /// Adds --window, --stride and --max-tokens.
  void add_to(CLI::App& command);
  EvaluationOptions resolve(const LoadedModel& model) const;
  /// The tokens of the text to score. Throws what evaluate would throw for them.
  std::vector<int64_t> read(const std::string& path, const LoadedModel& model, const Tokenizer& tokenizer) const;
};

/// The tokens of a text file. `role` names the file in errors ("calibration").
std::vector<int64_t> read_tokens(const std::string& path, const Tokenizer& tokenizer, const std::string& role);

}  // namespace gptq::tools
