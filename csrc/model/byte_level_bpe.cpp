#include "model/byte_level_bpe.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>

#include "model/utf8.h"

namespace gptq {
namespace {

constexpr int32_t kNone = -1;
constexpr int32_t kRemoved = -2;

std::array<uint32_t, 256> make_byte_alphabet() {
  std::array<uint32_t, 256> alphabet{};
  uint32_t next_substitute = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    alphabet[byte] = printable ? byte : next_substitute++;
  }
  return alphabet;
}

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t(uint32_t(left)) << 32 | uint32_t(right);
}

}  // namespace

const std::array<uint32_t, 256>& byte_alphabet() {
  static const std::array<uint32_t, 256> alphabet = make_byte_alphabet();
  return alphabet;
}

std::string to_byte_alphabet(std::string_view bytes) {
  std::string token;
  for (char byte : bytes) append_utf8(token, byte_alphabet()[static_cast<uint8_t>(byte)]);
  return token;
}

std::string from_byte_alphabet(const std::string& token) {
  static const std::unordered_map<uint32_t, char> bytes_of = [] {
    std::unordered_map<uint32_t, char> map;
    for (int byte = 0; byte < 256; ++byte) map[byte_alphabet()[byte]] = static_cast<char>(byte);
    return map;
  }();
  std::string bytes;
  for (size_t at = 0; at < token.size();) {
    const DecodedCodePoint point = decode_utf8(token, at);
    const auto found = bytes_of.find(point.value);
    if (found == bytes_of.end()) return token;
    bytes += found->second;
    at += point.length;
  }
  return bytes;
}

ByteLevelBpe::ByteLevelBpe(const BpeModel& model) : unk_id_(kNone), fuse_unk_(model.fuse_unk) {
  std::unordered_map<std::string, int32_t> ids;
  ids.reserve(model.tokens.size());
  for (size_t id = 0; id < model.tokens.size(); ++id) ids.emplace(model.tokens[id], static_cast<int32_t>(id));
  const auto id_of = [&ids](const std::string& token) {
    const auto found = ids.find(token);
    return found == ids.end() ? kNone : found->second;
  };

  for (int byte = 0; byte < 256; ++byte) byte_ids_[byte] = id_of(to_byte_alphabet(std::string(1, char(byte))));
  if (model.unk_token) {
    unk_id_ = id_of(*model.unk_token);
    const bool needed = std::find(byte_ids_.begin(), byte_ids_.end(), kNone) != byte_ids_.end();
    if (unk_id_ == kNone && needed) throw std::runtime_error("unk_token is not in the vocabulary");
  }
  merges_.reserve(model.merges.size());
  for (size_t rank = 0; rank < model.merges.size(); ++rank) {
    const auto& [left, right] = model.merges[rank];
    for (const std::string& token : {left, right, left + right}) {
      if (id_of(token) == kNone) {
        throw std::runtime_error("merge " + std::to_string(rank) + " needs a token that is not in the vocabulary");
      }
    }
    // Of a pair that is listed twice the last rank counts, as in Hugging Face tokenizers.
    merges_[pair_key(id_of(left), id_of(right))] = {static_cast<uint32_t>(rank), id_of(left + right)};
  }
  if (model.ignore_merges) whole_words_ = std::move(ids);
}

const ByteLevelBpe::Merge* ByteLevelBpe::find_merge(int32_t left, int32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void ByteLevelBpe::fill_symbols(std::string_view word, Workspace& workspace) const {
  auto& symbols = workspace.symbols;
  symbols.clear();
  bool after_unknown = false;
  for (char byte : word) {
    int32_t id = byte_ids_[static_cast<uint8_t>(byte)];
    const bool unknown = id == kNone;
    if (unknown) id = unk_id_;
    const bool fused = unknown && after_unknown && fuse_unk_;
    after_unknown = unknown;
    if (id == kNone || fused) continue;
    const auto position = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, position - 1, position + 1});
  }
  if (!symbols.empty()) symbols.back().next = kNone;
}

void ByteLevelBpe::merge_symbols(Workspace& workspace) const {
  auto& symbols = workspace.symbols;
  auto& queue = workspace.queue;  // a heap, least first: rank in the high half, position of the left symbol in the low
  queue.clear();
  const auto offer = [&](int32_t left) {
    if (left == kNone || symbols[left].next == kNone) return false;
    const Merge* merge = find_merge(symbols[left].id, symbols[symbols[left].next].id);
    if (merge == nullptr) return false;
    queue.push_back(uint64_t(merge->rank) << 32 | uint32_t(left));
    return true;
  };
  const auto offer_to_heap = [&](int32_t left) {
    if (offer(left)) std::push_heap(queue.begin(), queue.end(), std::greater<>());
  };
  for (size_t position = 0; position < symbols.size(); ++position) offer(static_cast<int32_t>(position));
  std::make_heap(queue.begin(), queue.end(), std::greater<>());

  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), std::greater<>());
    const auto rank = static_cast<uint32_t>(queue.back() >> 32);
    const auto position = static_cast<int32_t>(queue.back() & 0xFFFFFFFFu);
    queue.pop_back();
    Workspace::Symbol& left = symbols[position];
    if (left.id == kRemoved || left.next == kNone) continue;
    Workspace::Symbol& right = symbols[left.next];
    const Merge* merge = find_merge(left.id, right.id);
    if (merge == nullptr || merge->rank != rank) continue;  // one of the two has merged with another since
    left.id = merge->id;
    left.next = right.next;
    right.id = kRemoved;
    if (left.next != kNone) symbols[left.next].previous = position;
    offer_to_heap(left.previous);
    offer_to_heap(position);
  }
}

void ByteLevelBpe::encode_word(std::string_view word, Workspace& workspace, std::vector<int64_t>& ids) const {
  if (word.size() > size_t(std::numeric_limits<int32_t>::max())) {
    throw std::runtime_error("a word of " + std::to_string(word.size()) + " bytes is too long");
  }
  if (!whole_words_.empty()) {
    const auto found = whole_words_.find(to_byte_alphabet(word));
    if (found != whole_words_.end()) {
      ids.push_back(found->second);
      return;
    }
  }
  fill_symbols(word, workspace);
  merge_symbols(workspace);
  for (const Workspace::Symbol& symbol : workspace.symbols) {
    if (symbol.id != kRemoved) ids.push_back(symbol.id);
  }
}

}  // namespace gptq
