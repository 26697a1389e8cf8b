#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace gptq {

/// One step of a UTF-8 decoder.
struct DecodedCodePoint {
  uint32_t value;  ///< the code point, U+FFFD where the bytes are ill-formed
  size_t length;   ///< bytes consumed, at least 1: of ill-formed bytes, the longest start of a well-formed sequence
  bool valid;
};

/// Decodes the code point that begins at `text[at]`, at < text.size(). Ill-formed bytes are cut as the Unicode
/// standard recommends (table 3-8), like Python's errors="replace" and Rust's from_utf8_lossy.
DecodedCodePoint decode_utf8(std::string_view text, size_t at);

/// The code point that ends at `text[end - 1]`; text must be valid UTF-8 and end > 0.
DecodedCodePoint decode_utf8_before(std::string_view text, size_t end);

void append_utf8(std::string& text, uint32_t code_point);

bool is_valid_utf8(std::string_view text);

/// `text` with every ill-formed sequence replaced by U+FFFD.
std::string replace_invalid_utf8(std::string_view text);

/// Unicode's White_Space property.
bool is_white_space(uint32_t code_point);

}  // namespace gptq
