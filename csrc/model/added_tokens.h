#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace gptq {

/// A token that is found in the text as it stands, before the text is cut into words.
struct AddedToken {
  std::string content;
  int64_t id = 0;
  bool single_word = false;  ///< not beside a word character
  bool lstrip = false;       ///< takes the white space on its left
  bool rstrip = false;       ///< takes the white space on its right
  bool normalized = false;   ///< searched after the tokens without it
  bool special = false;      ///< left out by decode if asked to
};

/// Finds added tokens in text: the leftmost, and of those the longest, like the automaton of Hugging Face tokenizers.
class AddedTokenFinder {
 public:
  /// A piece of the text, with its id if it is an added token.
  using PieceFunction = std::function<void(std::string_view piece, std::optional<int64_t> id)>;

  /// No content may be empty.
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);
  AddedTokenFinder(const AddedTokenFinder&) = delete;
  AddedTokenFinder& operator=(const AddedTokenFinder&) = delete;

  /// Calls `take_piece` for the added tokens in `text` (valid UTF-8) and the non-empty pieces between them, in order.
  void split(std::string_view text, const PieceFunction& take_piece) const;

 private:
  const AddedToken* match_at(std::string_view text, size_t at) const;

  std::vector<AddedToken> tokens_;
  std::unordered_map<std::string_view, const AddedToken*> by_content_;  // points into tokens_
  std::vector<std::vector<size_t>> lengths_;  // by first byte: the lengths of the tokens, longest first
};

}  // namespace gptq
