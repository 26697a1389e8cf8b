#include "model/added_tokens.h"

#include <algorithm>
#include <utility>

#include "model/split_pattern.h"
#include "model/utf8.h"

namespace gptq {
namespace {

bool stands_alone(std::string_view text, size_t begin, size_t end) {
  if (begin > 0 && is_word_character(decode_utf8_before(text, begin).value)) return false;
  return end == text.size() || !is_word_character(decode_utf8(text, end).value);
}

size_t skip_white_space_left(std::string_view text, size_t end, size_t limit) {
  while (end > limit) {
    const DecodedCodePoint point = decode_utf8_before(text, end);
    if (!is_white_space(point.value)) break;
    end -= point.length;
  }
  return end;
}

size_t skip_white_space_right(std::string_view text, size_t begin) {
  while (begin < text.size()) {
    const DecodedCodePoint point = decode_utf8(text, begin);
    if (!is_white_space(point.value)) break;
    begin += point.length;
  }
  return begin;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)), lengths_(256) {
  for (const AddedToken& token : tokens_) {
    by_content_[token.content] = &token;
    lengths_[static_cast<uint8_t>(token.content[0])].push_back(token.content.size());
  }
  for (auto& lengths : lengths_) {
    std::sort(lengths.rbegin(), lengths.rend());
    lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  }
}

const AddedToken* AddedTokenFinder::match_at(std::string_view text, size_t at) const {
  for (size_t length : lengths_[static_cast<uint8_t>(text[at])]) {
    const auto found = length <= text.size() - at ? by_content_.find(text.substr(at, length)) : by_content_.end();
    if (found != by_content_.end()) return found->second;
  }
  return nullptr;
}

void AddedTokenFinder::split(std::string_view text, const PieceFunction& take_piece) const {
  size_t done = 0;
  for (size_t at = 0; at < text.size() && !tokens_.empty();) {
    const AddedToken* token = match_at(text, at);
    if (token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at;
    size_t end = at + token->content.size();
    at = end;
    if (token->single_word && !stands_alone(text, begin, end)) continue;
    if (token->lstrip) begin = std::max(done, skip_white_space_left(text, begin, done));
    if (token->rstrip) end = skip_white_space_right(text, end);
    if (done < begin) take_piece(text.substr(done, begin - done), std::nullopt);
    // A token of white space may lie inside what the one before it stripped.
    take_piece(begin < end ? text.substr(begin, end - begin) : std::string_view(), token->id);
    done = end;
  }
  if (done < text.size()) take_piece(text.substr(done), std::nullopt);
}

}  // namespace gptq
