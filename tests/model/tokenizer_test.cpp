#include "model/tokenizer.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "model/byte_level_bpe.h"
#include "model/split_pattern.h"
#include "model/utf8.h"

namespace gptq {
namespace {

using std::string_literals::operator""s;
using Ids = std::vector<int64_t>;

// Ids 0..255 are the bytes; then the merges' tokens in order, then <|endoftext|>.
const std::vector<std::pair<std::string, std::string>> kMerges = {
    {"h", "e"}, {"l", "l"}, {"he", "ll"}, {"hell", "o"}, {"Ġ", "hell"}, {"a", "a"}, {"aa", "aa"}};

nlohmann::json make_vocabulary() {
  nlohmann::json vocabulary;
  for (int byte = 0; byte < 256; ++byte) vocabulary[to_byte_alphabet(std::string(1, static_cast<char>(byte)))] = byte;
  for (const auto& [left, right] : kMerges) vocabulary[left + right] = vocabulary.size();
  vocabulary["<|endoftext|>"] = vocabulary.size();
  return vocabulary;
}

constexpr int64_t kHe = 256, kHell = 258, kHello = 259, kSpaceHell = 260, kAa = 261, kAaaa = 262, kEnd = 263;

nlohmann::json make_tokenizer_json() {
  nlohmann::json json = {{"model", {{"type", "BPE"}, {"vocab", make_vocabulary()}, {"merges", kMerges}}},
                         {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
                         {"decoder", {{"type", "ByteLevel"}}}};
  json["added_tokens"] = {{{"id", kEnd}, {"content", "<|endoftext|>"}, {"special", true}}};
  return json;
}

class TokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() / (std::string("gptq_tokenizer_test_") + test->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void write(const std::string& name, const std::string& content) {
    std::ofstream(folder_ / name, std::ios::binary) << content;
  }

  void write_vocabulary_and_merges() {
    write("vocab.json", make_vocabulary().dump());
    std::string merges = "#version: 0.2\n";
    for (const auto& [left, right] : kMerges) merges += left + " " + right + "\n";
    write("merges.txt", merges);
  }

  Tokenizer load() { return Tokenizer::load(folder_.string()); }

  Tokenizer load(const nlohmann::json& tokenizer_json) {
    write("tokenizer.json", tokenizer_json.dump());
    return load();
  }

  // Loading must fail with one line that names the file and holds `part`.
  void expect_error(const std::string& file, const std::string& part) {
    try {
      load();
      ADD_FAILURE() << "loaded, expected an error with: " << part;
    } catch (const std::runtime_error& error) {
      const std::string message = error.what();
      EXPECT_EQ(message.rfind((file.empty() ? folder_ : folder_ / file).string() + ": ", 0), 0u) << message;
      EXPECT_NE(message.find(part), std::string::npos) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    }
  }

  void expect_error_in(const nlohmann::json& tokenizer_json, const std::string& part) {
    write("tokenizer.json", tokenizer_json.dump());
    expect_error("tokenizer.json", part);
  }

  std::filesystem::path folder_;
};

TEST(ByteAlphabet, FollowsGpt2) {
  EXPECT_EQ(byte_alphabet()['!'], uint32_t('!'));
  EXPECT_EQ(byte_alphabet()[0], 256u);
  EXPECT_EQ(to_byte_alphabet(" \n"), "ĠĊ");
  EXPECT_EQ(byte_alphabet()[0xAD], 323u);
  EXPECT_EQ(byte_alphabet()[0xFF], 0xFFu);
}

TEST(ByteAlphabet, ComesBack) {
  std::string bytes;
  for (int byte = 0; byte < 256; ++byte) bytes += static_cast<char>(byte);
  EXPECT_EQ(from_byte_alphabet(to_byte_alphabet(bytes)), bytes);
  EXPECT_EQ(from_byte_alphabet("日x"), "日x");
}

TEST(Utf8, ReplacesTheLongestIllFormedStart) {
  EXPECT_EQ(replace_invalid_utf8("a\xFF"
                                 "b"),
            "a\uFFFDb");
  EXPECT_EQ(replace_invalid_utf8("\xF0\x9F\x98"), "\uFFFD");
  EXPECT_EQ(replace_invalid_utf8("\xE0\x80\x41"),
            "\uFFFD\uFFFD"
            "A");
  EXPECT_EQ(replace_invalid_utf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(replace_invalid_utf8("\xF4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(replace_invalid_utf8("\xC3\xA9\xF0\x9F\x98\x80"), "é😀");
}

TEST(Utf8, EveryCodePointComesBack) {
  for (uint32_t point = 0; point <= 0x10FFFF; ++point) {
    if (point >= 0xD800 && point <= 0xDFFF) continue;
    std::string text;
    append_utf8(text, point);
    const DecodedCodePoint decoded = decode_utf8(text, 0);
    ASSERT_TRUE(decoded.valid && decoded.value == point && decoded.length == text.size()) << point;
    ASSERT_EQ(decode_utf8_before("é" + text, 2 + text.size()).value, point);
  }
}

std::vector<std::string> pieces_of(const std::string& regex, const std::string& text) {
  std::vector<std::string> pieces;
  SplitPattern(regex).split(text, [&](std::string_view piece, bool) { pieces.emplace_back(piece); });
  return pieces;
}

TEST(SplitPatternTest, CutsLikeGpt2) {
  const std::vector<std::string> expected = {"I", "'ll", " say", ":", "  ", " 42", "é", "\u180e", "\n"};
  EXPECT_EQ(pieces_of(kGpt2SplitPattern, "I'll say:   42é\u180e\n"), expected);
}

TEST(SplitPatternTest, EmptyMatchesCutBetweenCharacters) {
  EXPECT_EQ(pieces_of("x*", "aéxxb"), (std::vector<std::string>{"a", "é", "xx", "b"}));
}

TEST(SplitPatternTest, RefusesWhatMeansSomethingElse) {
  for (const char* regex :
       {"\\h", "\\w+", "a{1,3}+", "[a[b]]", "[a&&b]", "(?m:a)", "(*FAIL)", "(", "[a", "\\", "\\p{", "\\p{Nope}"}) {
    EXPECT_THROW(SplitPattern{regex}, std::runtime_error) << regex;
  }
}

TEST(SplitPatternTest, EndsWhereRepeatsNest) {
  EXPECT_THROW(pieces_of("(?:a+)+[bc]", std::string(100, 'a')), std::runtime_error);
}

TEST_F(TokenizerTest, MergesByRank) {
  write_vocabulary_and_merges();
  const Tokenizer tokenizer = load();
  EXPECT_EQ(tokenizer.vocabulary_size(), 264);
  EXPECT_EQ(tokenizer.end_of_text(), kEnd);
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.encode("hello"), Ids{kHello});
  // "hell o" has rank 3, "Ġ hell" rank 4.
  EXPECT_EQ(tokenizer.encode(" hello"), (Ids{' ', kHello}));
  EXPECT_EQ(tokenizer.encode(" hell he"), (Ids{kSpaceHell, ' ', kHe}));
  EXPECT_EQ(tokenizer.encode("aaaaaaa"), (Ids{kAaaa, kAa, 'a'}));
  EXPECT_EQ(tokenizer.encode("hell<|endoftext|>hell"), (Ids{kHell, kEnd, kHell}));
}

TEST_F(TokenizerTest, PrefersTokenizerJson) {
  write_vocabulary_and_merges();
  nlohmann::json json = make_tokenizer_json();
  json["pre_tokenizer"]["add_prefix_space"] = true;
  EXPECT_EQ(load(json).encode("hell"), Ids{kSpaceHell});
}

TEST_F(TokenizerTest, DecodesWhatItEncodes) {
  const Tokenizer tokenizer = load(make_tokenizer_json());
  const std::string text = "hello\0 \x1f\u0085 日本 👩‍👩‍👧 <|endoftext|> \t\n"s;
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  EXPECT_EQ(tokenizer.decode({kHello, kEnd}), "hello<|endoftext|>");
  EXPECT_EQ(tokenizer.decode({kHello, kEnd}, true), "hello");
  EXPECT_EQ(tokenizer.decode({'a', 0xE6, 0x97, 'b'}), "a\uFFFDb");
  EXPECT_THROW(tokenizer.decode({0, 264}), std::runtime_error);
  EXPECT_THROW(tokenizer.decode({-1}), std::runtime_error);
}

TEST_F(TokenizerTest, IllFormedInputCountsAsReplacementCharacter) {
  const Tokenizer tokenizer = load(make_tokenizer_json());
  EXPECT_EQ(tokenizer.encode("a\xFF\xE6\x97"), tokenizer.encode("a\uFFFD\uFFFD"));
}

// Quadratic work on these would take hours; recursion or PCRE2's limits would fail.
TEST_F(TokenizerTest, LongRunsAreOneWord) {
  const Tokenizer tokenizer = load(make_tokenizer_json());
  const size_t length = 4'000'001;
  const Ids ids = tokenizer.encode(std::string(length, 'a'));
  ASSERT_EQ(ids.size(), 1'000'001u);
  EXPECT_EQ(ids.front(), kAaaa);
  EXPECT_EQ(ids.back(), 'a');
  EXPECT_EQ(tokenizer.encode(std::string(length, ' ') + "hell").size(), length);
  EXPECT_EQ(tokenizer.encode(std::string(length, '\n')).size(), length);
  EXPECT_EQ(tokenizer.encode(std::string(length, '<')).size(), length);
}

TEST_F(TokenizerTest, MissingFiles) {
  expect_error("", "neither tokenizer.json nor vocab.json");
  EXPECT_THROW(Tokenizer::load((folder_ / "none").string()), std::runtime_error);
  write("vocab.json", make_vocabulary().dump());
  expect_error("merges.txt", "no such file");
  std::filesystem::create_directory(folder_ / "merges.txt");
  expect_error("merges.txt", "not a regular file");
}

TEST_F(TokenizerTest, MalformedVocabularies) {
  write_vocabulary_and_merges();
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "not valid JSON"},
      {"{\"a\": 0", "not valid JSON at byte 8"},
      {"[1]", "must hold a JSON object"},
      {"{}", "is empty"},
      {R"({"a": 0, "b": 0})", "both have id 0"},
      {R"({"a": 0, "b": 2})", "from 0 to 1"},
      {R"({"a": 0, "b": -1})", "from 0 to 1"},
      {R"({"a": 0, "b": 1.0})", "from 0 to 1"},
      {R"({"a": 0, "b": "1"})", "from 0 to 1"},
      {R"({"a": 0, "b": 99999999999999999999})", "from 0 to 1"},
      {"{\"\xFF\": 0}", "not valid JSON"},
      {std::string(100'000, '['), "not valid JSON"},
  };
  for (const auto& [content, reason] : cases) {
    write("vocab.json", content);
    expect_error("vocab.json", reason);
  }
}

TEST_F(TokenizerTest, MalformedMerges) {
  write_vocabulary_and_merges();
  write("merges.txt", "#version: 0.2\nh e\nonlyone\n");
  expect_error("merges.txt", "line 3 must be two tokens");
  write("merges.txt", "h e l\n");
  expect_error("merges.txt", "line 1 must be two tokens");
  write("merges.txt", "h e\nno token\n");
  expect_error("vocab.json", "merge 1 needs a token");
}

TEST_F(TokenizerTest, UnsupportedFieldsAreNamed) {
  const auto changed = [](const char* pointer, const nlohmann::json& value) {
    nlohmann::json json = make_tokenizer_json();
    json[nlohmann::json::json_pointer(pointer)] = value;
    return json;
  };
  const nlohmann::json byte_level = {{"type", "ByteLevel"}};
  const nlohmann::json digits = {{"type", "Digits"}};
  expect_error_in(changed("/normalizer", {{"type", "NFC"}}), "normalizer must be null, got {\"type\":\"NFC\"}");
  expect_error_in(changed("/model", nullptr), "model must be an object, got none");
  expect_error_in(changed("/model/type", "Unigram"), "model.type must be \"BPE\", got \"Unigram\"");
  expect_error_in(changed("/model/merges/2", {"a"}), "model.merges[2]");
  expect_error_in(changed("/model/ignore_merges", "yes"), "model.ignore_merges must be true or false");
  expect_error_in(changed("/added_tokens/0/id", 5), "the id of \"<|endoftext|>\" must be 263, got 5");
  expect_error_in(changed("/added_tokens/0/id", -5), "added_tokens[0].id must be a whole number, got -5");
  expect_error_in(changed("/added_tokens/0/content", ""), "added_tokens[0].content must not be empty");
  expect_error_in(changed("/added_tokens/1", {{"id", kEnd}, {"content", "<|endoftext|>"}}), "twice");
  expect_error_in(changed("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {digits}}}), "must be the last");
  expect_error_in(changed("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {byte_level, digits}}}),
                  "must be the last");
  const nlohmann::json split = {{"type", "Split"}, {"pattern", {{"Regex", "\\w+"}}}, {"behavior", "Isolated"}};
  expect_error_in(changed("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {split, byte_level}}}),
                  "at byte 0 of the pattern: \\w is not supported");
}

TEST_F(TokenizerTest, EndOfTextComesFromTheConfiguration) {
  write("tokenizer_config.json", R"({"eos_token": {"content": "hell"}})");
  EXPECT_EQ(load(make_tokenizer_json()).end_of_text(), kHell);
  write("tokenizer_config.json", R"({"eos_token": "absent"})");
  EXPECT_EQ(load(make_tokenizer_json()).end_of_text(), std::nullopt);
  write("tokenizer_config.json", R"({"eos_token": 7})");
  expect_error("tokenizer_config.json", "eos_token must be a string, got 7");
}

}  // namespace
}  // namespace gptq
