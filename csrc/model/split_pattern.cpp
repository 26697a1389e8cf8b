#include "model/split_pattern.h"

#include <limits>
#include <optional>
#include <stdexcept>

#include "model/regex.h"
#include "model/utf8.h"

namespace gptq {

const char* const kGpt2SplitPattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

// Members of a character class. ASCII members of a property are spelt out: PCRE2 then tests them in a bitmap.
constexpr char kWhiteSpace[] = R"(\t-\r\x20\x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// What Unicode 15, 15.1 and 16 added to L, N and M. No character left these categories after Unicode 14.
constexpr char kLetters[] =
    R"(A-Za-z\p{L}\x{1c89}-\x{1c8a}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3}\x{10d4a}-\x{10d65})"
    R"(\x{10d6f}-\x{10d85}\x{10ec2}-\x{10ec4}\x{1123f}-\x{11240}\x{11380}-\x{11389}\x{1138b}\x{1138e})"
    R"(\x{11390}-\x{113b5}\x{113b7}\x{113d1}\x{113d3}\x{11bc0}-\x{11be0}\x{11f02}\x{11f04}-\x{11f10})"
    R"(\x{11f12}-\x{11f33}\x{1342f}\x{13441}-\x{13446}\x{13460}-\x{143fa}\x{16100}-\x{1611d}\x{16d40}-\x{16d6c})"
    R"(\x{18cff}\x{1b132}\x{1b155}\x{1df25}-\x{1df2a}\x{1e030}-\x{1e06d}\x{1e4d0}-\x{1e4eb}\x{1e5d0}-\x{1e5ed})"
    R"(\x{1e5f0}\x{2b739}\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";
constexpr char kNumbers[] = R"(0-9\p{N}\x{10d40}-\x{10d49}\x{116d0}-\x{116e3}\x{11bf0}-\x{11bf9}\x{11f50}-\x{11f59})"
                            R"(\x{16130}-\x{16139}\x{16d70}-\x{16d79}\x{1ccf0}-\x{1ccf9}\x{1d2c0}-\x{1d2d3})"
                            R"(\x{1e4f0}-\x{1e4f9}\x{1e5f1}-\x{1e5fa})";
constexpr char kMarks[] =
    R"(\p{M}\x{897}\x{cf3}\x{ece}\x{10d69}-\x{10d6d}\x{10efc}-\x{10eff}\x{11241}\x{113b8}-\x{113c0})"
    R"(\x{113c2}\x{113c5}\x{113c7}-\x{113ca}\x{113cc}-\x{113d0}\x{113d2}\x{113e1}-\x{113e2})"
    R"(\x{11f00}-\x{11f01}\x{11f03}\x{11f34}-\x{11f3a}\x{11f3e}-\x{11f42}\x{11f5a}\x{13440})"
    R"(\x{13447}-\x{13455}\x{1611e}-\x{1612f}\x{1e08f}\x{1e4ec}-\x{1e4ef}\x{1e5ee}-\x{1e5ef})";

[[noreturn]] void fail_at(size_t offset, const std::string& reason) {
  throw std::runtime_error("at byte " + std::to_string(offset) + " of the pattern: " + reason);
}

bool is_ascii_letter_or_digit(char c) {
  return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

// Rewrites a pattern in Oniguruma's Ruby syntax for PCRE2, one construct at a time.
class PatternTranslator {
 public:
  explicit PatternTranslator(const std::string& regex) : in_(regex) {}

  std::string translate() {
    while (at_ < in_.size()) {
      if (in_[at_] == '\\') {
        escape();
      } else if (in_class_) {
        class_member();
      } else {
        outside_class();
      }
    }
    return out_;
  }

 private:
  bool follows(std::string_view text) const { return std::string_view(in_).substr(at_, text.size()) == text; }

  void copy(size_t count) {
    out_.append(in_, at_, count);
    at_ += count;
  }

  void replace(size_t count, const char* members, bool negated = false) {
    out_ += in_class_ ? std::string(members) : (negated ? "[^" : "[") + std::string(members) + "]";
    at_ += count;
  }

  void escape() {
    if (follows("\\s")) return replace(2, kWhiteSpace);
    if (follows("\\S") && !in_class_) return replace(2, kWhiteSpace, true);
    if (follows("\\p{L}")) return replace(5, kLetters);
    if (follows("\\p{N}")) return replace(5, kNumbers);
    if (follows("\\p{M}")) return replace(5, kMarks);
    if (at_ + 1 == in_.size()) fail_at(at_, "it ends in a backslash");
    const char kind = in_[at_ + 1];
    constexpr std::string_view kSameMeaning = "SdDpPrntfxz";
    if (is_ascii_letter_or_digit(kind) && kSameMeaning.find(kind) == std::string_view::npos) {
      fail_at(at_, std::string("\\") + kind + " is not supported");
    }
    size_t length = 2;
    if ((kind == 'p' || kind == 'P' || kind == 'x') && at_ + 2 < in_.size() && in_[at_ + 2] == '{') {
      const size_t brace = in_.find('}', at_);
      if (brace == std::string::npos) fail_at(at_, "{ without }");
      length = brace + 1 - at_;
    }
    copy(length);
  }

  void class_member() {
    if (follows("[") && !follows("[:")) fail_at(at_, "a class inside a class is not supported");
    if (follows("&&")) fail_at(at_, "&& inside a class is not supported");
    if (follows("[:")) {
      const size_t end = in_.find(":]", at_);
      if (end == std::string::npos) fail_at(at_, "[: without :]");
      return copy(end + 2 - at_);
    }
    in_class_ = in_[at_] != ']';
    copy(1);
  }

  void outside_class() {
    if (follows("(*")) fail_at(at_, "(* is not supported");
    if (follows("(?")) {
      for (std::string_view group : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"}) {
        if (follows(group)) return copy(group.size());
      }
      fail_at(at_, "this kind of group is not supported");
    }
    // Ruby reads x{1,3}+ as (?:x{1,3})+, PCRE2 as possessive.
    if (follows("}+")) fail_at(at_, "{n,m}+ is not supported");
    if (follows("[")) {
      in_class_ = true;
      copy(follows("[^") ? 2 : 1);
      if (follows("]")) fail_at(at_, "an empty class is not supported");
      return;
    }
    copy(1);
  }

  const std::string& in_;
  std::string out_;
  size_t at_ = 0;
  bool in_class_ = false;
};

}  // namespace

SplitPattern::SplitPattern(const std::string& regex)
    : regex_(std::make_shared<Regex>(PatternTranslator(regex).translate())) {}

void SplitPattern::split(std::string_view text, const PieceFunction& take_piece) const {
  if (text.empty()) return;
  Regex::Search matches(*regex_, text);
  size_t done = 0;
  size_t search = 0;
  size_t last_match_end = std::numeric_limits<size_t>::max();
  while (search <= text.size()) {
    const auto match = matches.from(search);
    if (!match) break;
    const auto [begin, end] = *match;
    if (begin == end) {
      // An empty match cuts the text, except right after a match; the search moves on by one character.
      search = end < text.size() ? end + decode_utf8(text, end).length : end + 1;
      if (end == last_match_end) continue;
    } else {
      search = end;
    }
    if (done < begin) take_piece(text.substr(done, begin - done), false);
    if (begin < end) take_piece(text.substr(begin, end - begin), true);
    done = end;
    last_match_end = end;
  }
  if (done < text.size()) take_piece(text.substr(done), false);
}

std::string escape_regex(std::string_view text) {
  std::string regex;
  for (char c : text) {
    if (static_cast<uint8_t>(c) > 0x20 && static_cast<uint8_t>(c) < 0x7F && !is_ascii_letter_or_digit(c)) regex += '\\';
    regex += c;
  }
  return regex;
}

bool is_word_character(uint32_t code_point) {
  // The numbers added after Unicode 14 are all decimal digits except U+1D2C0..1D2D3.
  static const Regex pattern(std::string(R"((?![\x{1d2c0}-\x{1d2d3}\p{No}])[)") + kLetters + kMarks + kNumbers +
                             R"(\p{Alphabetic}\p{Pc}\x{200c}\x{200d}])" + R"(|[\p{Alphabetic}])");
  std::string text;
  append_utf8(text, code_point);
  return Regex::Search(pattern, text).from(0).has_value();
}

}  // namespace gptq
