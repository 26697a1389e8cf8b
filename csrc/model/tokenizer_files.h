#pragma once

#include <optional>
#include <string>
#include <vector>

#include "model/added_tokens.h"
#include "model/byte_level_bpe.h"

namespace gptq {

/// One step of cutting text into words. A piece may get a space in front, is then cut by the regex, and the pieces that
/// are kept go to the next step.
struct SplitStage {
  std::optional<std::string> regex;  ///< in tokenizers' syntax, see SplitPattern; none: not cut
  bool add_prefix_space = false;     ///< unless the piece begins with one
  bool drop_matches = false;
  bool drop_between = false;
};

/// Everything that the files of a tokenizer say, checked.
struct TokenizerDefinition {
  std::string file;  ///< the file to name in errors
  BpeModel model;
  std::vector<AddedToken> added_tokens;  ///< ids are those of the model, or follow them without a gap
  std::vector<SplitStage> stages;
  std::string end_of_text;  ///< the token that ends a text, whether or not the vocabulary has it
};

/// Reads tokenizer.json, or vocab.json and merges.txt where there is none, and tokenizer_config.json if there is one.
/// @throws std::runtime_error "FILE: reason" for files that are missing, malformed, or ask for what is not supported.
TokenizerDefinition read_tokenizer_files(const std::string& folder);

}  // namespace gptq
