#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace gptq {

/// What defines a byte-level BPE model, as tokenizer files give it. Tokens are spelt in GPT-2's byte alphabet.
struct BpeModel {
  std::vector<std::string> tokens;                          ///< indexed by id
  std::vector<std::pair<std::string, std::string>> merges;  ///< in order of rank, lowest first
  std::optional<std::string> unk_token;                     ///< stands for bytes that are not tokens; none: dropped
  bool fuse_unk = false;                                    ///< one unk_token for a run of such bytes
  bool ignore_merges = false;                               ///< a word that is a token is that token
};

/// GPT-2's alphabet of 256 printable characters: the code point that stands for each byte.
const std::array<uint32_t, 256>& byte_alphabet();

std::string to_byte_alphabet(std::string_view bytes);

/// The bytes a token stands for: its own UTF-8 bytes if it is not spelt in the byte alphabet.
std::string from_byte_alphabet(const std::string& token);

/// Byte-pair encoding of words (Sennrich et al. 2016; byte-level: Radford et al. 2019): of all adjacent pairs, the one
/// with the lowest rank, and of those the leftmost, merges until none is left. O(n log n) in the length of a word.
/// Immutable after construction.
class ByteLevelBpe {
 public:
  /// @throws std::runtime_error if a merge or unk_token names a token that does not exist.
  explicit ByteLevelBpe(const BpeModel& model);

  /// Buffers that a caller reuses from word to word.
  struct Workspace {
    struct Symbol {
      int32_t id;  // kRemoved once merged into its left neighbour
      int32_t previous;
      int32_t next;
    };
    std::vector<Symbol> symbols;
    std::vector<uint64_t> queue;
  };

  /// Appends the ids of one word, given as raw bytes (fewer than 2^31).
  void encode_word(std::string_view word, Workspace& workspace, std::vector<int64_t>& ids) const;

 private:
  struct Merge {
    uint32_t rank;
    int32_t id;
  };
  struct PairHash {
    size_t operator()(uint64_t pair) const {
      pair *= 0x9E3779B97F4A7C15u;
      return pair ^ pair >> 32;
    }
  };

  const Merge* find_merge(int32_t left, int32_t right) const;
  void fill_symbols(std::string_view word, Workspace& workspace) const;
  void merge_symbols(Workspace& workspace) const;

  std::array<int32_t, 256> byte_ids_;
  std::unordered_map<uint64_t, Merge, PairHash> merges_;
  std::unordered_map<std::string, int32_t> whole_words_;  // filled only for ignore_merges
  int32_t unk_id_;
  bool fuse_unk_;
};

}  // namespace gptq
