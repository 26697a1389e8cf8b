// linear_w4 for AVX2 with two or three digits, from a dozen rows on, or three to four with codes of 8 bits. Digits 0
// and 1 are one number of 16 bits here: vpmaddwd sums its products in 32 bits at once, where vpmaddubsw, in as many
// instructions, leaves sums of 16 bits to be widened. 128 is added to that number, since both digits reach -128; what
// this adds to the sums is taken off column by column. Digit 2 is multiplied by vpmaddubsw, or with codes of 8 bits,
// whose products would not fit, by vpmaddwd too.
#pragma once

#include "cpu/linear_w4_avx2.h"

namespace gptq {
namespace {

constexpr int64_t kGroupAtoms = 17;  // that a group of 128 columns may touch
constexpr int64_t kWideChunk = 64;   // rows that one unpacking of the weights serves

// A group's digits are [atoms][8] of 16 bits and, if three, [atoms][8] of 8 bits. The first are in the order
// 0 2 1 3 4 6 5 7, in which codes as bytes become 16 bits by a mask and a shift. A group of zeros, or with a NaN, keeps
// zeros for 128: its scale hides what is then taken off.
struct Avx2WideSplit : Avx2 {
  template <int D>
  static void split(const float* x, int64_t atoms, float lift, float ratio, int8_t* digits, int32_t* sums) {
    const __m256i places =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, 2, 6, 10, 14, -1, -1, -1, -1));
    __m256i total = _mm256_setzero_si256(), top = total;
    for (int64_t i = 0; i < atoms; ++i) {
      __m256i value = round_scaled(x + 8 * i, lift, ratio);
      total = _mm256_add_epi32(total, value);
      if constexpr (D == 3) {
        value = _mm256_xor_si256(_mm256_add_epi32(value, _mm256_set1_epi32(0x8080)), _mm256_set1_epi32(0x8000));
        top = _mm256_add_epi32(top, _mm256_srai_epi32(value, 16));
      }
      const __m256i bytes = _mm256_shuffle_epi8(value, places);
      const __m128i first = _mm256_castsi256_si128(bytes), second = _mm256_extracti128_si256(bytes, 1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + 16 * i), _mm_unpacklo_epi64(first, second));
      if constexpr (D == 3)
        _mm_storel_epi64(reinterpret_cast<__m128i*>(digits + 16 * atoms + 8 * i), _mm_unpackhi_epi32(first, second));
    }
    sums[0] = sum(_mm256_sub_epi32(total, _mm256_slli_epi32(top, 16)));
    sums[1] = sum(top);
    if constexpr (D == 3) sums[2] = 0;
  }
};

// C blocks of 16 columns, over at most kWideChunk rows.
template <int B, int D, int C>
class Avx2WideBlocks {
 public:
  Avx2WideBlocks(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block)
      : p_(p), outputs_(p, row_begin, row_end, block) {}

  void run() {
    for (int64_t g = 0; g < p_.n_groups; ++g) {
      unpack(p_.groups[g]);
      for (int64_t row = outputs_.row_begin, rows; row < outputs_.row_end; row += rows) {
        rows = even_share(outputs_.row_end - row, kRows);
        if constexpr (D == 3 && B == 8) widen_top(p_.groups[g], row, rows);
        for (int c = 0; c < C; ++c) multiply_rows<kRows>(g, row, rows, c);
      }
    }
    outputs_.write();
  }

 private:
  using Int = Avx2::Int;
  using Float = Avx2::Float;
  using Codes = __m256i[2];  // of eight columns each

  template <int R>
  struct Tile {
    Int row[R];
  };

  static constexpr int kRows = 6;  // 12 of the 16 registers
  static constexpr bool kUsesFours = D == 3 && B == 4;
  static constexpr int kFoursAtOnce = 8;  // sums of pairs, each at most 2·15·128, stay within 16 bits
  static constexpr int64_t kPairs = kGroupAtoms * 4, kFours = ceil_div(kGroupAtoms * 2, kFoursAtOnce) * kFoursAtOnce;

  // Codes of eight columns as bytes: of columns 0..3 of each row, or 4..7.
  static __m256i load_bytes(const uint8_t* atom, int half) {
    if constexpr (B == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(atom + 64 * half));
    return Avx2::load_codes<B>(atom, 0, half);
  }

  // The codes of the group's columns, as pairs of 16 bits and as fours of 8, zeros behind these.
  void unpack(const LinearW4Group& group) {
    const int64_t block_stride = ceil_div(p_.k, kAtomColumns) * atom_bytes(B), fours = 2 * group.atoms;
    const uint8_t* block = p_.packed + outputs_.block * block_stride + group.first_atom * atom_bytes(B);
    for (int c = 0; c < C; ++c)
      for (int h = 0; h < 2; ++h) {
        const uint8_t* from = block + c * block_stride + 32 * h;
        __m256i total = _mm256_setzero_si256();
        for (int64_t i = 0; i < fours; i += 2, from += atom_bytes(B)) {
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const __m256i codes = load_bytes(from, half), odd = _mm256_srli_epi16(codes, 8),
                          even = _mm256_and_si256(codes, _mm256_set1_epi16(0x00ff));
            pairs_[c][2 * (i + half)][h] = even;
            pairs_[c][2 * (i + half) + 1][h] = odd;
            if constexpr (kUsesFours) fours_[c][i + half][h] = codes;
            total = _mm256_add_epi16(total, _mm256_add_epi16(even, odd));
          }
        }
        if constexpr (kUsesFours)
          for (int64_t i = fours; i % kFoursAtOnce != 0; ++i) fours_[c][i][h] = _mm256_setzero_si256();
        lift_[c].half[h] = _mm256_madd_epi16(total, _mm256_set1_epi16(-128));
      }
  }

  // Digit 2 of some rows as 16 bits.
  void widen_top(const LinearW4Group& group, int64_t row, int64_t rows) {
    const __m128i places = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < group.atoms; ++i) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(top_digits(group, row + r) + 8 * i));
        top_[r][i] = _mm_cvtepi8_epi16(_mm_shuffle_epi8(bytes, places));
      }
  }

  const int8_t* wide_digits(const LinearW4Group& group, int64_t row) const {
    return p_.x_digits + row * p_.digit_stride + group.digit_atom * D * kAtomColumns;
  }
  const int8_t* top_digits(const LinearW4Group& group, int64_t row) const {
    return wide_digits(group, row) + group.atoms * 2 * kAtomColumns;
  }

  template <int R>
  void multiply_rows(int64_t g, int64_t row, int64_t rows, int c) {
    if constexpr (R > 1) {
      if (rows < R) return multiply_rows<R - 1>(g, row, rows, c);
    }
    const LinearW4Group& group = p_.groups[g];
    const auto wide = dot_pairs<R>(D == 3 ? lift_[c] : Avx2::broadcast_int(0), pairs_[c], wide_digits(group, row),
                                   p_.digit_stride, 4 * group.atoms);
    auto top = wide;
    if constexpr (kUsesFours) {
      top = dot_fours<R>(fours_[c], top_digits(group, row), p_.digit_stride, 2 * group.atoms);
    } else if constexpr (D == 3) {
      top = dot_pairs<R>(Avx2::broadcast_int(0), pairs_[c], reinterpret_cast<const int8_t*>(top_), sizeof(top_[0]),
                         4 * group.atoms);
    }
    if (p_.zeros) return add_up<R, true>(g, row, c, wide, top);
    add_up<R, false>(g, row, c, wide, top);
  }

  // sums = start + codes · digits
  template <int R>
  [[gnu::noinline]] static Tile<R> dot_pairs(Int start, const Codes* codes, const int8_t* digits, int64_t digit_stride,
                                             int64_t pairs) {
    Int s[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) s[r] = start;
    for (int64_t i = 0; i < pairs; ++i) {
      const __m256i first = codes[i][0], second = codes[i][1];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256i two = Avx2::broadcast_digits(digits + r * digit_stride + 4 * i);
        Avx2::add_pairs(s[r].half[0], first, two);
        Avx2::add_pairs(s[r].half[1], second, two);
      }
    }
    Tile<R> sums;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) sums.row[r] = s[r];
    return sums;
  }

  // sums = codes · digits
  template <int R>
  [[gnu::noinline]] static Tile<R> dot_fours(const Codes* codes, const int8_t* digits, int64_t digit_stride,
                                             int64_t fours) {
    Tile<R> sums;
    for (int64_t i = 0; i < fours; i += kFoursAtOnce) {
      Int s[R];
#pragma GCC unroll 8
      for (int j = 0; j < kFoursAtOnce; ++j) {
        const __m256i first = codes[i + j][0], second = codes[i + j][1];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const __m256i four = Avx2::broadcast_digits(digits + r * digit_stride + 4 * (i + j));
          if (j == 0) {
            s[r] = {{_mm256_maddubs_epi16(first, four), _mm256_maddubs_epi16(second, four)}};
          } else {
            Avx2::add_products(s[r].half[0], first, four);
            Avx2::add_products(s[r].half[1], second, four);
          }
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const __m256i sum = _mm256_madd_epi16(s[r].half[h], _mm256_set1_epi16(1));
          sums.row[r].half[h] = i == 0 ? sum : _mm256_add_epi32(sums.row[r].half[h], sum);
        }
      asm("" : "+m"(sums));  // leaves all registers to s
    }
    return sums;
  }

  // Step 3 of the arithmetic in linear_w4.h, where 256·J_1 + J_0 is wide.
  template <int R, bool kZeros>
  void add_up(int64_t g, int64_t row, int c, const Tile<R>& wide, const Tile<R>& top) {
    const LinearW4Group& group = p_.groups[g];
    const int64_t parameters = group.weight_group * p_.n + (outputs_.block + c) * kAtomRows;
    const int64_t n_groups = p_.n_groups, lanes = outputs_.lanes(c);
    const int32_t* offsets = p_.x_offsets + (row * n_groups + g) * D;
    const float* x_scales = p_.x_scales + row * n_groups + g;
    const Float scale = Avx2::load_f16(p_.scales + parameters, lanes);
    const Int zero = kZeros ? Avx2::load_u8(p_.zeros + parameters, lanes) : Avx2::broadcast_int(0);
    const auto value = [&](int r) {
      const int32_t wide_sum = offsets[r * n_groups * D], top_sum = offsets[r * n_groups * D + 1];
      const Int offset = kZeros ? Avx2::mul_int(zero, wide_sum) : Avx2::broadcast_int(wide_sum);
      Float v = Avx2::to_float(Avx2::add_int(wide.row[r], offset));
      if constexpr (D == 2) {
        v = Avx2::mul(v, Avx2::broadcast(0x1p-8f));
      } else {
        const Int top_offset = kZeros ? Avx2::scale_zero(zero, top_sum) : Avx2::broadcast_int(top_sum);
        v = Avx2::fma(v, Avx2::broadcast(0x1p-16f), Avx2::to_float(Avx2::add_int(top.row[r], top_offset)));
      }
      return Avx2::mul(v, scale);
    };
    const int64_t from = row - outputs_.row_begin;
    outputs_.template add<R>(from, c, value, [&](int r) { return x_scales[r * n_groups]; });
    if (group.ends_span) outputs_.end_span(from, R, c);
  }

  const LinearW4Problem& p_;
  __m256i pairs_[C][kPairs][2];
  __m256i fours_[kUsesFours ? C : 1][kFours][2];
  __m128i top_[kRows][kGroupAtoms];
  Int lift_[C];  // what 128 in each of digits 0 and 1 is worth
  BlockOutputs<Avx2, C, kWideChunk> outputs_;
};

template <int B, int D>
void multiply_wide_rows(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                        int64_t block_end) {
  constexpr int kBlocks = 2;
  for (int64_t row = row_begin; row < row_end; row += kWideChunk) {
    const int64_t end = row_end - row < kWideChunk ? row_end : row + kWideChunk;
    int64_t block = block_begin;
    for (; block + kBlocks <= block_end; block += kBlocks) Avx2WideBlocks<B, D, kBlocks>(p, row, end, block).run();
    if (block < block_end) Avx2WideBlocks<B, D, 1>(p, row, end, block).run();
  }
}

// The same answer for all rows that are split together. A single digit has nothing to gain; fewer rows do not pay for
// the unpacking, which saves codes of 8 bits from being two nibbles.
inline bool takes_wide_digits(const LinearW4Problem& p) {
  const int64_t least_rows = p.bits == 8 ? p.digits + 1 : 12;
  return p.digits > 1 && p.m >= least_rows;
}

inline void split_avx2(const LinearW4Problem& p, int64_t row_begin, int64_t row_end) {
  if (!takes_wide_digits(p)) return split_entry<Avx2>(p, row_begin, row_end);
  with_digits(p.digits, [&](auto d) {
    if constexpr (decltype(d)::value > 1) split_rows<Avx2WideSplit, decltype(d)::value>(p, row_begin, row_end);
  });
}

inline void multiply_avx2(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                          int64_t block_end) {
  if (!takes_wide_digits(p)) return multiply_entry<Avx2>(p, row_begin, row_end, block_begin, block_end);
  with_bits_and_digits(p, [&](auto b, auto d) {
    if constexpr (decltype(d)::value > 1)
      multiply_wide_rows<decltype(b)::value, decltype(d)::value>(p, row_begin, row_end, block_begin, block_end);
  });
}

}  // namespace
}  // namespace gptq
