// What the kernels of linear_w4 for AVX2 share: lanes are two halves of eight, and the product is by vpmaddubsw, whose
// sums are gathered in 16 bits for four atoms at a time. Codes of 8 bits are two nibbles, since their sums would not
// fit.
#pragma once

#include <immintrin.h>

#include "cpu/linear_w4_kernel.h"

namespace gptq {
namespace {

struct Avx2 {
  struct Int {
    __m256i half[2];
  };
  struct Float {
    __m256 half[2];
  };

  static constexpr int rows(int digits) { return 6 / digits; }  // 12 of the 16 registers
  static constexpr int blocks(int, int) { return 1; }

  static uint32_t max_magnitude(const float* x, int64_t vectors) {
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < 2 * vectors; ++i) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * i));
      largest = _mm256_max_epi32(largest, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
  }

  static int32_t sum(__m256i value) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
  }

  // X of eight columns, see step 2 of the arithmetic.
  static __m256i round_scaled(const float* x, float lift, float ratio) {
    const __m256 lifted = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(lift));
    return _mm256_cvtps_epi32(_mm256_mul_ps(lifted, _mm256_set1_ps(ratio)));
  }

  // Adding 128 to every digit makes the digits the bytes of the sum; flipping the top bits takes the 128 off again.
  // Three digits are stored with 8 bytes behind them, which the next atom or the next group overwrites.
  template <int D>
  static void split(const float* x, int64_t atoms, float lift, float ratio, int8_t* digits, int32_t* sums) {
    const __m256i offset = _mm256_set1_epi32(D == 1 ? 0x80 : D == 2 ? 0x8080 : 0x808080);
    const __m256i by_digit =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i halves_together = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i total = _mm256_setzero_si256();  // of pairs of a digit
    for (int64_t i = 0; i < atoms; ++i) {
      const __m256i value = _mm256_add_epi32(round_scaled(x + 8 * i, lift, ratio), offset);
      __m256i bytes = _mm256_shuffle_epi8(_mm256_xor_si256(value, offset), by_digit);
      total = _mm256_add_epi16(total, _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes));
      bytes = _mm256_permutevar8x32_epi32(bytes, halves_together);
      int8_t* atom = digits + i * D * kAtomColumns;
      if constexpr (D == 1) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(atom), _mm256_castsi256_si128(bytes));
      } else if constexpr (D == 2) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(atom), _mm256_castsi256_si128(bytes));
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(atom), bytes);
      }
    }
    total = _mm256_madd_epi16(total, _mm256_set1_epi16(1));
    const __m128i by_sum = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    __builtin_memcpy(sums, &by_sum, sizeof(int32_t) * D);
  }

  static __m256i broadcast_digits(const int8_t* four) {
    int32_t value;
    __builtin_memcpy(&value, four, sizeof(value));
    return _mm256_set1_epi32(value);
  }

  // One nibble of each code of eight columns, as bytes: of columns 0..3 of each row, or 4..7.
  template <int B>
  [[gnu::always_inline]] static __m256i load_codes(const uint8_t* atom, int nibble, int half) {
    const int64_t offset = B == 8 ? 64 * half : 0;
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(atom + offset));
    const bool upper = B == 8 ? nibble == 1 : half == 1;
    return _mm256_and_si256(upper ? _mm256_srli_epi32(codes, 4) : codes, _mm256_set1_epi8(0x0f));
  }

  // g++ would add products to each other first, which takes more registers than there are.
  [[gnu::always_inline]] static void add_products(__m256i& sum, __m256i codes, __m256i digits) {
    const __m256i products = _mm256_maddubs_epi16(codes, digits);
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(products));
  }

  [[gnu::always_inline]] static void add_pairs(__m256i& sum, __m256i codes, __m256i digits) {
    const __m256i products = _mm256_madd_epi16(codes, digits);
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products));
  }

  // One half of the atoms after the other, so that half as many registers hold codes. Isa: load_codes and add_products;
  // kFresh: sums hold nothing yet.
  template <class Isa, int B, bool kFresh, int R, int D>
  [[gnu::always_inline]] static void add_atom(Int (&sums)[R][1][D], const uint8_t* atom, int nibble,
                                              const int8_t* digits, int64_t digit_stride) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i first = Isa::template load_codes<B>(atom, nibble, half);
      const __m256i second = Isa::template load_codes<B>(atom + 32, nibble, half);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
          const __m256i four = broadcast_digits(digits + r * digit_stride + d * kAtomColumns + 4 * half);
          Int& sum = sums[r][0][d];
          if (kFresh && half == 0) {
            sum = {{_mm256_maddubs_epi16(first, four), _mm256_maddubs_epi16(second, four)}};
          } else {
            Isa::add_products(sum.half[0], first, four);
            Isa::add_products(sum.half[1], second, four);
          }
        }
    }
  }

  // Adds at most four atoms to j: eight sums of pairs, each at most 2·15·128, stay within 16 bits. Those of digit 1
  // join those of digit 0.
  template <int B, int R, int D>
  [[gnu::always_inline]] static void add_widened(Int (&j)[R][1][D], const uint8_t* weights, const int8_t* digits,
                                                 int64_t digit_stride, int64_t atoms) {
#pragma GCC unroll 2
    for (int nibble = 0; nibble < B / 4; ++nibble) {
      Int sums[R][1][D];
      add_atom<Avx2, B, true>(sums, weights, nibble, digits, digit_stride);
#pragma GCC unroll 4
      for (int64_t i = 1; i < atoms; ++i)
        add_atom<Avx2, B, false>(sums, weights + i * atom_bytes(B), nibble, digits + i * D * kAtomColumns,
                                 digit_stride);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
          const bool merged = D > 1 && d == 1;
          const __m256i weight = _mm256_set1_epi16((nibble == 0 ? 1 : 16) * (merged ? 256 : 1));
          Int& to = j[r][0][merged ? 0 : d];
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h)
            to.half[h] = _mm256_add_epi32(to.half[h], _mm256_madd_epi16(sums[r][0][d].half[h], weight));
        }
      asm volatile("" ::: "memory");  // keeps the loads of one nibble behind the sums of the other
    }
  }

  // Digits 0 and 1 have one sum, 256·J_1 + J_0, which saves registers. It is exact, and v rounds but once, so that v is
  // the same for that sum and zero as for the two.
  template <int B, int R, int C, int D>
  [[gnu::always_inline]] static void dot(Int (&j)[R][C][D], const uint8_t* weights, int64_t, const int8_t* digits,
                                         int64_t digit_stride, int64_t atoms) {
    static_assert(C == 1);
    if constexpr (D > 1) {
      for (int r = 0; r < R; ++r) j[r][0][0] = shift8_add(j[r][0][1], j[r][0][0]);
    }
    int64_t i = 0;
    for (; i + 4 <= atoms; i += 4)
      add_widened<B>(j, weights + i * atom_bytes(B), digits + i * D * kAtomColumns, digit_stride, 4);
    if (i < atoms)
      add_widened<B>(j, weights + i * atom_bytes(B), digits + i * D * kAtomColumns, digit_stride, atoms - i);
    if constexpr (D > 1) {
      for (int r = 0; r < R; ++r) j[r][0][1] = broadcast_int(0);
    }
  }

  static Float broadcast(float value) { return {{_mm256_set1_ps(value), _mm256_set1_ps(value)}}; }
  static Int broadcast_int(int32_t value) { return {{_mm256_set1_epi32(value), _mm256_set1_epi32(value)}}; }
  static Int add_int(Int a, Int b) {
    return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
  }
  static Int mul_int(Int a, int32_t b) {
    const __m256i factor = _mm256_set1_epi32(b);
    return {{_mm256_mullo_epi32(a.half[0], factor), _mm256_mullo_epi32(a.half[1], factor)}};
  }
  static Int scale_zero(Int zero, int32_t offset) {
    const __m256i factor = _mm256_set1_epi32(offset);
    return {{_mm256_madd_epi16(zero.half[0], factor), _mm256_madd_epi16(zero.half[1], factor)}};
  }
  static Int shift8_add(Int high, Int low) {
    return {{_mm256_add_epi32(_mm256_slli_epi32(high.half[0], 8), low.half[0]),
             _mm256_add_epi32(_mm256_slli_epi32(high.half[1], 8), low.half[1])}};
  }
  static Float to_float(Int a) { return {{_mm256_cvtepi32_ps(a.half[0]), _mm256_cvtepi32_ps(a.half[1])}}; }
  static Float add(Float a, Float b) {
    return {{_mm256_add_ps(a.half[0], b.half[0]), _mm256_add_ps(a.half[1], b.half[1])}};
  }
  static Float mul(Float a, Float b) {
    return {{_mm256_mul_ps(a.half[0], b.half[0]), _mm256_mul_ps(a.half[1], b.half[1])}};
  }
  static Float fma(Float a, Float b, Float c) {
    return {{_mm256_fmadd_ps(a.half[0], b.half[0], c.half[0]), _mm256_fmadd_ps(a.half[1], b.half[1], c.half[1])}};
  }
  static Int load_u8(const uint8_t* from, int64_t count) {
    uint8_t tail[16] = {};
    if (count < 16) from = static_cast<uint8_t*>(__builtin_memcpy(tail, from, count));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {{_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))}};
  }
  static Float load_f16(const uint16_t* from, int64_t count) {
    uint16_t tail[16] = {};
    if (count < 16) from = static_cast<uint16_t*>(__builtin_memcpy(tail, from, sizeof(*from) * count));
    const auto* vectors = reinterpret_cast<const __m128i*>(from);
    return {{_mm256_cvtph_ps(_mm_loadu_si128(vectors)), _mm256_cvtph_ps(_mm_loadu_si128(vectors + 1))}};
  }
  static Float load_bf16(const uint16_t* from, int64_t count) {
    uint16_t tail[16] = {};
    if (count < 16) from = static_cast<uint16_t*>(__builtin_memcpy(tail, from, sizeof(*from) * count));
    const auto widen = [&](int half) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + half);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    };
    return {{widen(0), widen(1)}};
  }
  static void store_halves(uint16_t* to, __m128i first, __m128i second, int64_t count) {
    uint16_t tail[16];
    uint16_t* at = count < 16 ? tail : to;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), first);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at) + 1, second);
    if (count < 16) __builtin_memcpy(to, tail, sizeof(*to) * count);
  }
  static void store_f16(uint16_t* to, Float value, int64_t count) {
    store_halves(to, _mm256_cvtps_ph(value.half[0], _MM_FROUND_TO_NEAREST_INT),
                 _mm256_cvtps_ph(value.half[1], _MM_FROUND_TO_NEAREST_INT), count);
  }
  static __m128i round_to_bf16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  }
  static void store_bf16(uint16_t* to, Float value, int64_t count) {
    store_halves(to, round_to_bf16(value.half[0]), round_to_bf16(value.half[1]), count);
  }
  static Float load(const float* from, int64_t count) {
    float tail[16] = {};
    if (count < 16) from = static_cast<float*>(__builtin_memcpy(tail, from, sizeof(*from) * count));
    return {{_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}};
  }
  static void store(float* to, Float value, int64_t count) {
    float tail[16];
    float* at = count < 16 ? tail : to;
    _mm256_storeu_ps(at, value.half[0]);
    _mm256_storeu_ps(at + 8, value.half[1]);
    if (count < 16) __builtin_memcpy(to, tail, sizeof(*to) * count);
  }
};

}  // namespace
}  // namespace gptq
