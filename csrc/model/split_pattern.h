#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace gptq {

/// The pattern that cuts text into words before byte-level BPE in GPT-2 (Radford et al. 2019, encoder.py).
extern const char* const kGpt2SplitPattern;

/// A regular expression that cuts text, with the meaning it has in Hugging Face tokenizers.
///
/// tokenizers (0.23) matches with Oniguruma 6.9.10 in Ruby syntax and Unicode 16; this class matches with PCRE2, which
/// differs in the Unicode version (10.42: Unicode 14) and in taking U+180E for white space. The pattern is therefore
/// translated: \s becomes the White_Space characters, \p{L}, \p{N} and \p{M} gain the characters of Unicode 15 and 16.
/// Other properties keep PCRE2's Unicode version. Syntax that means something else in the two engines is refused.
/// Safe to use from several threads.
class SplitPattern {
 public:
  /// `is_match`: the piece matched the pattern; otherwise it lies between matches.
  using PieceFunction = std::function<void(std::string_view piece, bool is_match)>;

  /// @throws std::runtime_error with the reason and the byte offset in the pattern.
  explicit SplitPattern(const std::string& regex);

  /// Calls `take_piece` for the consecutive, non-empty pieces of `text`, which together are the text.
  /// `text` must be valid UTF-8; its length is not limited.
  /// @throws std::runtime_error if matching exceeds PCRE2's limits (possible only with nested repeats).
  void split(std::string_view text, const PieceFunction& take_piece) const;

 private:
  std::shared_ptr<const class Regex> regex_;
};

/// A regular expression that matches `text` itself.
std::string escape_regex(std::string_view text);

/// Rust's \w (Alphabetic, M, Nd, Pc, Join_Control), which decides where an added token with single_word may stand.
bool is_word_character(uint32_t code_point);

}  // namespace gptq
