#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace gptq {

/// Byte-level BPE of GPT-2 and its relatives, with the ids that Hugging Face `tokenizers` gives for the same files
/// (Tokenizer.encode(text, add_special_tokens=False), compared with 0.23).
///
/// Immutable and cheap to copy; all methods are safe to call from several threads.
class Tokenizer {
 public:
  /// Reads a Hugging Face model folder: tokenizer.json if there is one, else vocab.json and merges.txt.
  ///
  /// Of tokenizer.json it reads model (BPE with vocab, merges, unk_token, fuse_unk, ignore_merges), added_tokens
  /// (all flags), and pre_tokenizer (ByteLevel, alone or after Split and Digits); normalizer must be null,
  /// post_processor and decoder null or ByteLevel. truncation and padding are not applied.
  /// With vocab.json the split pattern is GPT-2's, and add_prefix_space, added_tokens_decoder and eos_token come from
  /// tokenizer_config.json where there is one; the end-of-text token is an added token, as in transformers.
  ///
  /// @throws std::runtime_error, one line that names the file, the field and the value, for files that are missing,
  ///         larger than 512 MiB, malformed (ids that repeat or leave a gap, merges of unknown tokens) or unsupported.
  static Tokenizer load(const std::string& folder);

  /// The ids of a text. Added tokens are recognized in the text, special ones too; nothing is put before or after it.
  /// `text` is UTF-8, may hold NUL bytes, and may be as long as memory allows, up to 2^31 - 1 bytes a word. Ill-formed
  /// sequences count as U+FFFD, the way Python decodes with errors="replace".
  std::vector<int64_t> encode(std::string_view text) const;

  /// The text of ids, valid UTF-8: bytes that are not, such as half a character at the end, become U+FFFD.
  /// Without U+FFFD and dropped bytes decode(encode(text)) == text, unless the files strip or add spaces.
  /// @param skip_special_tokens  leave out special added tokens, such as <|endoftext|>
  /// @throws std::runtime_error for an id outside [0, vocabulary_size()).
  std::string decode(const std::vector<int64_t>& ids, bool skip_special_tokens = false) const;

  /// Number of tokens, added ones included; ids are 0 to vocabulary_size() - 1.
  int64_t vocabulary_size() const;

  /// Id of tokenizer_config.json's eos_token, or without one of "<|endoftext|>"; none if the vocabulary lacks it.
  std::optional<int64_t> end_of_text() const;

 private:
  struct Data;
  explicit Tokenizer(std::shared_ptr<const Data> data) : data_(std::move(data)) {}

  std::shared_ptr<const Data> data_;
};

}  // namespace gptq
