#include "model/utf8.h"

#include <cstring>

namespace gptq {
namespace {

constexpr uint32_t kReplacement = 0xFFFD;

struct LeadByte {
  int continuation_bytes;  // -1: no sequence begins with this byte
  uint8_t second_low;      // range of the second byte: excludes overlong forms, surrogates and values over U+10FFFF
  uint8_t second_high;
};

LeadByte classify_lead(uint8_t byte) {
  if (byte < 0x80) return {0, 0, 0};
  if (byte < 0xC2) return {-1, 0, 0};
  if (byte < 0xE0) return {1, 0x80, 0xBF};
  if (byte < 0xF0) return {2, uint8_t(byte == 0xE0 ? 0xA0 : 0x80), uint8_t(byte == 0xED ? 0x9F : 0xBF)};
  if (byte < 0xF5) return {3, uint8_t(byte == 0xF0 ? 0x90 : 0x80), uint8_t(byte == 0xF4 ? 0x8F : 0xBF)};
  return {-1, 0, 0};
}

}  // namespace

DecodedCodePoint decode_utf8(std::string_view text, size_t at) {
  const auto first = static_cast<uint8_t>(text[at]);
  const LeadByte lead = classify_lead(first);
  if (lead.continuation_bytes == 0) return {first, 1, true};
  if (lead.continuation_bytes < 0) return {kReplacement, 1, false};
  uint32_t value = first & (0x3F >> lead.continuation_bytes);
  for (int i = 1; i <= lead.continuation_bytes; ++i) {
    if (at + i >= text.size()) return {kReplacement, size_t(i), false};
    const auto byte = static_cast<uint8_t>(text[at + i]);
    const uint8_t low = i == 1 ? lead.second_low : 0x80;
    const uint8_t high = i == 1 ? lead.second_high : 0xBF;
    if (byte < low || byte > high) return {kReplacement, size_t(i), false};
    value = value << 6 | (byte & 0x3F);
  }
  return {value, size_t(lead.continuation_bytes) + 1, true};
}

DecodedCodePoint decode_utf8_before(std::string_view text, size_t end) {
  size_t start = end - 1;
  while (start > 0 && (static_cast<uint8_t>(text[start]) & 0xC0) == 0x80) --start;
  return decode_utf8(text, start);
}

void append_utf8(std::string& text, uint32_t code_point) {
  if (code_point < 0x80) {
    text += static_cast<char>(code_point);
    return;
  }
  const int continuation_bytes = code_point < 0x800 ? 1 : code_point < 0x10000 ? 2 : 3;
  const uint32_t lead_mark = 0xFF00u >> (continuation_bytes + 1);
  text += static_cast<char>(lead_mark | code_point >> (6 * continuation_bytes));
  for (int i = continuation_bytes - 1; i >= 0; --i) text += static_cast<char>(0x80 | (code_point >> (6 * i) & 0x3F));
}

bool is_valid_utf8(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    uint64_t eight_bytes;
    if (at + sizeof(eight_bytes) <= text.size()) {
      std::memcpy(&eight_bytes, text.data() + at, sizeof(eight_bytes));
      if ((eight_bytes & 0x8080808080808080u) == 0) {
        at += sizeof(eight_bytes);
        continue;
      }
    }
    const DecodedCodePoint point = decode_utf8(text, at);
    if (!point.valid) return false;
    at += point.length;
  }
  return true;
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string repaired;
  repaired.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const DecodedCodePoint point = decode_utf8(text, at);
    if (point.valid) {
      repaired.append(text, at, point.length);
    } else {
      append_utf8(repaired, kReplacement);
    }
    at += point.length;
  }
  return repaired;
}

bool is_white_space(uint32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

}  // namespace gptq
