// Where everything lies in the CUDA kernels of linear_w4: plain functions of indices, which a test runs on the host.
#pragma once

#include "linear_w4.h"

#ifdef __CUDACC__
#define GPTQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GPTQ_HOST_DEVICE inline
#endif

namespace gptq {

/// Atoms that a group of 128 columns may touch, and steps of four atoms.
inline constexpr int kGroupAtoms = 17;
inline constexpr int kGroupSteps = (kGroupAtoms + 3) / 4;

/// The most columns that a row may have here: what is counted along k then fits 32 bits.
inline constexpr int64_t kMostColumns = int64_t{1} << 30;

/// Walks the activation groups of a row of k columns in weight groups of `width` columns, as linear_w4_groups lists
/// them.
struct GroupCursor {
  uint32_t k, width;
  uint32_t group, weight_group, begin, weight_end;

  /// The first group that begins at or after the column.
  GPTQ_HOST_DEVICE GroupCursor(int64_t k, int64_t width, int64_t column)
      : k(static_cast<uint32_t>(k)), width(static_cast<uint32_t>(width)) {
    const auto at = static_cast<uint32_t>(column);
    weight_group = at / this->width;
    uint32_t within = (at % this->width + kWidest - 1) / kWidest;
    if (within == per_weight_group()) {
      ++weight_group;
      within = 0;
    }
    group = weight_group * per_weight_group() + within;
    begin = weight_group * this->width + within * kWidest;
    weight_end = (weight_group + 1) * this->width;
  }

  /// The group of that number.
  GPTQ_HOST_DEVICE static GroupCursor at(int64_t k, int64_t width, int64_t group) {
    const int64_t per_weight_group = (width + kActivationGroup - 1) / kActivationGroup;
    return {k, width, group / per_weight_group * width + group % per_weight_group * kActivationGroup};
  }

  GPTQ_HOST_DEVICE bool done() const { return begin >= k; }
  GPTQ_HOST_DEVICE uint32_t end() const {
    const uint32_t weight = weight_end < k ? weight_end : k;
    return begin + kWidest < weight ? begin + kWidest : weight;
  }
  GPTQ_HOST_DEVICE uint32_t first_atom() const { return begin / kColumns; }
  GPTQ_HOST_DEVICE int atoms() const { return static_cast<int>((end() + kColumns - 1) / kColumns - first_atom()); }
  GPTQ_HOST_DEVICE int steps() const { return (atoms() + 3) / 4; }
  GPTQ_HOST_DEVICE uint32_t span() const { return begin / static_cast<uint32_t>(kSpan); }

  GPTQ_HOST_DEVICE void advance() {
    begin = end();
    ++group;
    if (begin == weight_end) {
      ++weight_group;
      weight_end += width;
    }
  }

 private:
  static constexpr uint32_t kWidest = kActivationGroup, kColumns = kAtomColumns;
  GPTQ_HOST_DEVICE uint32_t per_weight_group() const { return (width + kWidest - 1) / kWidest; }
};

/// How many activation groups a row has.
GPTQ_HOST_DEVICE int64_t group_total(int64_t k, int64_t width) {
  const int64_t per_weight_group = (width + kActivationGroup - 1) / kActivationGroup;
  return k / width * per_weight_group + (k % width + kActivationGroup - 1) / kActivationGroup;
}
/// How many spans a row of k columns has: none after the one that the last group begins in.
GPTQ_HOST_DEVICE int64_t span_total(int64_t k, int64_t width) {
  if (k == 0) return 0;
  const int64_t weight_begin = (k - 1) / width * width;
  return (weight_begin + (k - 1 - weight_begin) / kActivationGroup * kActivationGroup) / kSpan + 1;
}

// mma.m16n8k32: 16 columns of the weight by 8 tokens by 32 columns of the input. Lane 4·i + t holds, of the weight,
// rows i and i + 8 at k = 4·t .. 4·t + 3 and 16 further; of the digits, token i at the same k; of the sums, rows i and
// i + 8 for tokens 2·t and 2·t + 1. Which columns stand for the rows and the k is free, as long as all agree: rows i
// and i + 8 are columns 2·i and 2·i + 1 of the block, which lie side by side, and lane t's k are the columns of atom t
// of four, the first half and the second.

GPTQ_HOST_DEVICE int lane_atom(int lane) {
  return lane % 4;
}
/// Of the pair of columns; the first has sums 0 and 1, the second 2 and 3.
GPTQ_HOST_DEVICE int lane_column(int lane) {
  return lane / 4 * 2;
}
GPTQ_HOST_DEVICE int lane_digit_token(int lane) {
  return lane / 4;
}
GPTQ_HOST_DEVICE int sum_column(int lane, int sum) {
  return lane_column(lane) + sum / 2;
}
GPTQ_HOST_DEVICE int sum_token(int lane, int sum) {
  return lane % 4 * 2 + sum % 2;
}

/// Byte offset in an atom of the lane's two dwords; in an atom of 8-bit codes, those of the first half.
GPTQ_HOST_DEVICE int lane_byte(int lane) {
  return 4 * lane_column(lane);
}

// A group's weights in shared memory: its atoms one after another, the 16-byte pieces of each exchanged so that the
// lanes of half a warp, which load 8 bytes each, touch all banks once.

/// Bytes of one block of 16 columns.
GPTQ_HOST_DEVICE constexpr int staged_bytes(int bits) {
  return kGroupAtoms * static_cast<int>(atom_bytes(bits));
}
/// Where byte `byte` of the group lies.
GPTQ_HOST_DEVICE int staged_byte(int bits, int byte) {
  const int atom = byte / static_cast<int>(atom_bytes(bits));
  return byte ^ (bits == 4 ? atom % 4 / 2 : atom % 4) * 32;
}

/// The four codes of a dword of pack_w4 in columns k0 .. k3 (half 0) or k4 .. k7 (half 1), a byte each.
GPTQ_HOST_DEVICE uint32_t nibbles(uint32_t word, int half) {
  return (word >> (4 * half)) & 0x0f0f0f0f;
}

// What the split kernel writes, and the multiply kernels read, for eight tokens and one group: a record of the tokens'
// scales, then for each digit a float of each token, then the digits [step][digit][token][4 atoms][8], so that a lane's
// part of a step is 8 bytes at 8·lane. Steps after the last atom are not written.
inline constexpr int kTileTokens = 8;
inline constexpr int kRowBytes = kTileTokens * 32;

GPTQ_HOST_DEVICE constexpr int record_header_bytes(int digits) {
  return (1 + digits) * kTileTokens * 4;
}
GPTQ_HOST_DEVICE constexpr int record_bytes(int digits) {
  return record_header_bytes(digits) + kGroupSteps * digits * kRowBytes;
}
GPTQ_HOST_DEVICE int64_t record_byte(int64_t tile, int64_t groups, int64_t group, int digits) {
  return (tile * groups + group) * record_bytes(digits);
}

}  // namespace gptq
