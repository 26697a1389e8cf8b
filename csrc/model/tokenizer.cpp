#include "model/tokenizer.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "model/added_tokens.h"
#include "model/byte_level_bpe.h"
#include "model/split_pattern.h"
#include "model/tokenizer_files.h"
#include "model/utf8.h"

namespace gptq {

/// A step of splitting and its compiled pattern. Not in the unnamed namespace, since Tokenizer::Data holds it.
struct CompiledStage {
  SplitStage rules;
  std::optional<SplitPattern> pattern;
};

namespace {

std::vector<AddedToken> select_added_tokens(const std::vector<AddedToken>& tokens, bool normalized) {
  std::vector<AddedToken> selected;
  std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(selected),
               [normalized](const AddedToken& token) { return token.normalized == normalized; });
  return selected;
}

std::vector<CompiledStage> compile_stages(const std::vector<SplitStage>& rules) {
  std::vector<CompiledStage> stages;
  for (const SplitStage& stage : rules) {
    stages.push_back({stage, std::nullopt});
    if (!stage.regex) continue;
    try {
      stages.back().pattern.emplace(*stage.regex);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string("pre_tokenizer: ") + error.what());
    }
  }
  return stages;
}

}  // namespace

struct Tokenizer::Data {
  explicit Data(const TokenizerDefinition& definition)
      : bpe(definition.model),
        stages(compile_stages(definition.stages)),
        first_added(select_added_tokens(definition.added_tokens, false)),
        second_added(select_added_tokens(definition.added_tokens, true)) {
    for (const std::string& token : definition.model.tokens) token_bytes.push_back(from_byte_alphabet(token));
    is_special.resize(token_bytes.size());
    for (const AddedToken& token : definition.added_tokens) {
      const auto id = static_cast<size_t>(token.id);
      if (id == token_bytes.size()) {
        token_bytes.push_back(from_byte_alphabet(token.content));
        is_special.push_back(false);
      }
      is_special[id] = token.special;
      if (token.content == definition.end_of_text) end_of_text = token.id;
    }
    const auto& tokens = definition.model.tokens;
    const auto found = std::find(tokens.begin(), tokens.end(), definition.end_of_text);
    if (found != tokens.end()) end_of_text = found - tokens.begin();
  }

  ByteLevelBpe bpe;
  std::vector<CompiledStage> stages;
  AddedTokenFinder first_added;
  AddedTokenFinder second_added;
  std::vector<std::string> token_bytes;
  std::vector<bool> is_special;
  std::optional<int64_t> end_of_text;
};

namespace {

// One call of encode: the text goes through the stages, the words to BPE, and words seen before to a bounded cache.
class Encoder {
 public:
  Encoder(const ByteLevelBpe& bpe, const std::vector<CompiledStage>& stages, std::vector<int64_t>& ids)
      : bpe_(bpe), stages_(stages), ids_(ids) {}

  void encode_piece(std::string_view piece, size_t stage_index = 0) {
    if (stage_index == stages_.size()) return encode_word(piece);
    const CompiledStage& stage = stages_[stage_index];
    std::string with_space;
    if (stage.rules.add_prefix_space && piece.front() != ' ') {
      with_space.reserve(piece.size() + 1);
      with_space.append(" ").append(piece);
      piece = with_space;
    }
    if (!stage.pattern) return encode_piece(piece, stage_index + 1);
    stage.pattern->split(piece, [&](std::string_view part, bool is_match) {
      const bool dropped = is_match ? stage.rules.drop_matches : stage.rules.drop_between;
      if (!dropped) encode_piece(part, stage_index + 1);
    });
  }

 private:
  void encode_word(std::string_view word) {
    constexpr size_t kLongestCached = 64;
    constexpr size_t kMostCached = 1 << 16;
    if (word.size() > kLongestCached) return bpe_.encode_word(word, workspace_, ids_);
    key_.assign(word);
    const auto cached = cache_.find(key_);
    if (cached != cache_.end()) {
      ids_.insert(ids_.end(), cached->second.begin(), cached->second.end());
      return;
    }
    const size_t before = ids_.size();
    bpe_.encode_word(word, workspace_, ids_);
    if (cache_.size() < kMostCached) cache_.emplace(key_, std::vector<int64_t>(ids_.begin() + before, ids_.end()));
  }

  const ByteLevelBpe& bpe_;
  const std::vector<CompiledStage>& stages_;
  std::vector<int64_t>& ids_;
  ByteLevelBpe::Workspace workspace_;
  std::string key_;
  std::unordered_map<std::string, std::vector<int64_t>> cache_;
};

}  // namespace

Tokenizer Tokenizer::load(const std::string& folder) {
  const TokenizerDefinition definition = read_tokenizer_files(folder);
  try {
    return Tokenizer(std::make_shared<const Data>(definition));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(definition.file + ": " + error.what());
  }
}

std::vector<int64_t> Tokenizer::encode(std::string_view text) const {
  std::string repaired;
  if (!is_valid_utf8(text)) {
    repaired = replace_invalid_utf8(text);
    text = repaired;
  }
  std::vector<int64_t> ids;
  Encoder encoder(data_->bpe, data_->stages, ids);
  const auto take_second = [&](std::string_view piece, std::optional<int64_t> id) {
    if (id) {
      ids.push_back(*id);
    } else {
      encoder.encode_piece(piece);
    }
  };
  data_->first_added.split(text, [&](std::string_view piece, std::optional<int64_t> id) {
    if (id) {
      ids.push_back(*id);
    } else {
      data_->second_added.split(piece, take_second);
    }
  });
  return ids;
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids, bool skip_special_tokens) const {
  std::string bytes;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocabulary_size()) {
      throw std::runtime_error("decode: ids must be in [0, " + std::to_string(vocabulary_size()) + "), got ids[" +
                               std::to_string(i) + "] = " + std::to_string(ids[i]));
    }
    const auto id = static_cast<size_t>(ids[i]);
    if (!skip_special_tokens || !data_->is_special[id]) bytes += data_->token_bytes[id];
  }
  return is_valid_utf8(bytes) ? bytes : replace_invalid_utf8(bytes);
}

int64_t Tokenizer::vocabulary_size() const {
  return static_cast<int64_t>(data_->token_bytes.size());
}

std::optional<int64_t> Tokenizer::end_of_text() const {
  return data_->end_of_text;
}

}  // namespace gptq
