// Where everything lies in the CUDA kernels of linear_w4: plain functions of indices, which a test runs on the host.
#pragma once

#include "linear_w4.h"

#ifdef __CUDACC__
#define GPTQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GPTQ_HOST_DEVICE inline
#endif

namespace gptq {

/// Atoms that a group of 128 columns may touch; the digits of every group take as many.
inline constexpr int kGroupAtoms = 17;
inline constexpr int kGroupDigitBytes = kGroupAtoms * kAtomColumns;

/// Walks the activation groups of a row of k columns in weight groups of `width` columns, as linear_w4_groups lists
/// them.
struct GroupCursor {
  int64_t k, width;
  int64_t group, weight_group, begin, weight_end;

  /// The first group that begins at or after the column.
  GPTQ_HOST_DEVICE GroupCursor(int64_t k, int64_t width, int64_t column) : k(k), width(width) {
    weight_group = column / width;
    int64_t within = (column % width + kActivationGroup - 1) / kActivationGroup;
    if (within == per_weight_group()) {
      ++weight_group;
      within = 0;
    }
    group = weight_group * per_weight_group() + within;
    begin = weight_group * width + within * kActivationGroup;
    weight_end = (weight_group + 1) * width;
  }

  GPTQ_HOST_DEVICE bool done() const { return begin >= k; }
  GPTQ_HOST_DEVICE int64_t end() const {
    const int64_t weight = weight_end < k ? weight_end : k;
    return begin + kActivationGroup < weight ? begin + kActivationGroup : weight;
  }
  GPTQ_HOST_DEVICE int64_t first_atom() const { return begin / kAtomColumns; }
  GPTQ_HOST_DEVICE int atoms() const {
    return static_cast<int>((end() + kAtomColumns - 1) / kAtomColumns - first_atom());
  }
  GPTQ_HOST_DEVICE int64_t span() const { return begin / kSpan; }

  GPTQ_HOST_DEVICE void advance() {
    begin = end();
    ++group;
    if (begin == weight_end) {
      ++weight_group;
      weight_end += width;
    }
  }

 private:
  GPTQ_HOST_DEVICE int64_t per_weight_group() const { return (width + kActivationGroup - 1) / kActivationGroup; }
};

/// How many activation groups a row has.
GPTQ_HOST_DEVICE int64_t group_total(int64_t k, int64_t width) {
  const int64_t per_weight_group = (width + kActivationGroup - 1) / kActivationGroup;
  return k / width * per_weight_group + (k % width + kActivationGroup - 1) / kActivationGroup;
}
/// How many spans a row of k > 0 columns has: none after the one that the last group begins in.
GPTQ_HOST_DEVICE int64_t span_total(int64_t k, int64_t width) {
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

/// Byte offset in an atom of 4-bit codes of the lane's two dwords.
GPTQ_HOST_DEVICE int lane_byte(int lane) {
  return 4 * lane_column(lane);
}

/// The four codes of a dword of pack_w4 in columns k0 .. k3 (half 0) or k4 .. k7 (half 1), a byte each.
GPTQ_HOST_DEVICE uint32_t nibbles(uint32_t word, int half) {
  return (word >> (4 * half)) & 0x0f0f0f0f;
}

// The digits of a token: [group][digit][17 atoms][8], so that both halves of an atom are one load of 8 bytes.
GPTQ_HOST_DEVICE int64_t digit_byte(int64_t group, int digits, int digit, int atom) {
  return ((group * digits + digit) * kGroupAtoms + atom) * kAtomColumns;
}

}  // namespace gptq
