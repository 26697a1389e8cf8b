// linear_w4 for AMX: from five rows on, tiles of 16 rows of x and 16 columns of y, their int8 digits multiplied 64
// columns of the weight at a time. Fewer rows are computed by AVX512-VNNI. Tiles is what executes the tile
// instructions:
//   begin(), end()                            around all others, in the thread that uses them
//   zero<C>(), load<T>(from, stride), store<C>(to)
//   multiply<C, A, B, kSigned>()              tile C += signed bytes of A · signed or unsigned bytes of B
// all of 16 rows of 64 bytes.
#pragma once

#include "cpu/linear_w4_avx512vnni.h"

namespace gptq {
namespace {

constexpr int64_t kTileRows = kDigitRows;
constexpr int64_t kLineBytes = 64;  // a tile's row
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kStepAtoms = 8;   // 64 columns of the weight
constexpr int64_t kGroupSteps = 3;  // the 17 atoms that a group of 128 columns may touch
constexpr int64_t kChunkTiles = 2;  // row tiles that one unpacking of the weights serves

// Each digit of a group in a plane of its own, so that 64 bytes of it are a row of a tile.
struct DigitPlanes {
  template <int D>
  static int64_t at(int64_t atom, int digit, int64_t atoms) {
    return (digit * atoms + atom) * kAtomColumns;
  }

  template <int D>
  static void store(int8_t* digits, int64_t atom, int64_t atoms, __m512i bytes) {
    const __m512i planes =
        _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
    store_plane(digits + at<D>(atom, 0, atoms), atoms - atom, _mm512_castsi512_si128(planes));
    if constexpr (D > 1)
      store_plane(digits + at<D>(atom, 1, atoms), atoms - atom, _mm512_extracti32x4_epi32(planes, 1));
    if constexpr (D > 2)
      store_plane(digits + at<D>(atom, 2, atoms), atoms - atom, _mm512_extracti32x4_epi32(planes, 2));
  }

 private:
  static void store_plane(int8_t* to, int64_t atoms, __m128i two) {
    if (atoms > 1) return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), two);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), two);
  }
};

using AmxVectors = Avx512vnni<DigitPlanes>;

// What ldtilecfg reads: palette 1, and eight tiles of 16 rows of 64 bytes.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kTileConfig;

// C blocks of 16 columns, over some row tiles. Without zero points the middle code is taken off all codes, so that they
// are signed and their products are done; else x_offsets are added to these.
template <class Tiles, int B, int D, int C, bool kZeros>
class AmxBlocks {
 public:
  AmxBlocks(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block)
      : p_(p), outputs_(p, row_begin, row_end, block) {}

  // A tile's sums are added up while the next one's products run, some rows between each two steps of these.
  void run() {
    const int64_t rows = outputs_.row_end - outputs_.row_begin;
    Products done = {0, 0, 0};
    for (int64_t g = 0; g < p_.n_groups; ++g) {
      const LinearW4Group& group = p_.groups[g];
      const int64_t steps = ceil_div(group.atoms, kStepAtoms), share = ceil_div(kTileRows, steps);
      unpack(group);
      for (int64_t row = 0; row < rows; row += kTileRows) {
        zero_all<0>();
        for (int64_t step = 0; step < steps; ++step) {
          multiply(group, row, step);
          add_up(done, step * share, (step + 1) * share);
        }
        store_all<0>();
        done = {g, row, rows - row < kTileRows ? rows - row : kTileRows};
      }
    }
    add_up(done, 0, kTileRows);
    outputs_.write();
  }

 private:
  using Isa = AmxVectors;

  // What products_ holds: rows of the chunk, from row on.
  struct Products {
    int64_t group, row, rows;
  };

  // Tiles 0 .. C·D - 1 hold the products, the next ones the digits of a step if there is room for all, and 7 codes.
  static constexpr bool kHoldsDigits = C * D + D < 8;
  static constexpr int kDigitTile = kHoldsDigits ? C * D : 6, kCodeTile = 7;

  // Codes of the group's columns as bytes, zero behind its last atom.
  void unpack(const LinearW4Group& group) {
    const int64_t block_stride = ceil_div(p_.k, kAtomColumns) * atom_bytes(B), atoms = group.atoms;
    const __m512i middle = _mm512_set1_epi8(static_cast<char>(kZeros ? 0 : middle_code(B)));
    for (int c = 0; c < C; ++c) {
      const uint8_t* from = p_.packed + (outputs_.block + c) * block_stride + group.first_atom * atom_bytes(B);
      uint8_t* to = weights_[c];
#pragma GCC unroll 4
      for (int64_t i = 0; i < atoms; ++i, to += 2 * kLineBytes) {
        prefetch_codes<B>(from + i * atom_bytes(B));
        for (int half = 0; half < 2; ++half) {
          const __m512i codes = Isa::template load_codes<B>(from + i * atom_bytes(B), half);
          _mm512_store_si512(to + half * kLineBytes, _mm512_sub_epi8(codes, middle));
        }
      }
      const uint8_t* end = weights_[c] + ceil_div(atoms, kStepAtoms) * kTileBytes;
      for (; to < end; to += kLineBytes) _mm512_store_si512(to, _mm512_setzero_si512());
    }
  }

  void multiply(const LinearW4Group& group, int64_t row, int64_t step) {
    const int8_t* digits = p_.x_digits + (outputs_.row_begin + row) * p_.digit_stride +
                           (group.digit_atom * D + step * kStepAtoms) * kAtomColumns;
    const int64_t plane = group.atoms * kAtomColumns;
    if constexpr (kHoldsDigits) load_digits<0>(digits, plane);
    for_each_block<0>(digits, plane, step);
  }

  template <int T>
  void zero_all() {
    if constexpr (T < C * D) {
      Tiles::template zero<T>();
      zero_all<T + 1>();
    }
  }

  template <int T>
  void store_all() {
    if constexpr (T < C * D) {
      Tiles::template store<T>(products_[T / D][T % D]);
      store_all<T + 1>();
    }
  }

  template <int I>
  void load_digits(const int8_t* digits, int64_t plane) {
    if constexpr (I < D) {
      Tiles::template load<kDigitTile + I>(digits + I * plane, p_.digit_stride);
      load_digits<I + 1>(digits, plane);
    }
  }

  template <int I>
  void for_each_block(const int8_t* digits, int64_t plane, int64_t step) {
    if constexpr (I < C) {
      Tiles::template load<kCodeTile>(weights_[I] + step * kTileBytes, kLineBytes);
      for_each_digit<I, 0>(digits, plane);
      for_each_block<I + 1>(digits, plane, step);
    }
  }

  template <int Block, int I>
  void for_each_digit(const int8_t* digits, int64_t plane) {
    if constexpr (I < D) {
      constexpr int kTile = kHoldsDigits ? kDigitTile + I : kDigitTile;
      if constexpr (!kHoldsDigits) Tiles::template load<kTile>(digits + I * plane, p_.digit_stride);
      Tiles::template multiply<Block * D + I, kTile, kCodeTile, !kZeros>();
      for_each_digit<Block, I + 1>(digits, plane);
    }
  }

  // Step 3 of the arithmetic in linear_w4.h, for those rows begin .. end - 1 that done has. The loop reads no members:
  // it stores what might be one.
  void add_up(const Products& done, int64_t begin, int64_t end) {
    if (end > done.rows) end = done.rows;
    if (begin >= end) return;
    const LinearW4Group& group = p_.groups[done.group];
    typename Isa::Float scale[C];
    typename Isa::Int zero[C];
    for (int c = 0; c < C; ++c) {
      const int64_t parameters = group.weight_group * p_.n + (outputs_.block + c) * kAtomRows;
      scale[c] = Isa::load_f16(p_.scales + parameters, outputs_.lanes(c));
      if constexpr (kZeros) zero[c] = Isa::load_u8(p_.zeros + parameters, outputs_.lanes(c));
    }
    const int64_t n_groups = p_.n_groups;
    const int64_t at = (outputs_.row_begin + done.row + begin) * n_groups + done.group;
    const float* x_scale = p_.x_scales + at;
    const int32_t* offsets = p_.x_offsets + at * D;
    for (int64_t r = begin; r < end; ++r, x_scale += n_groups, offsets += n_groups * D) {
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) {
        typename Isa::Int j[D];
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
          j[d] = _mm512_load_si512(products_[c][d] + r * kAtomRows);
          if constexpr (kZeros) j[d] = _mm512_add_epi32(j[d], Isa::scale_zero(zero[c], offsets[d]));
        }
        const auto value = [&](int) { return Isa::mul(combine_digits<Isa, D>(j), scale[c]); };
        outputs_.template add<1>(done.row + r, c, value, [&](int) { return *x_scale; });
      }
    }
    if (group.ends_span)
      for (int c = 0; c < C; ++c) outputs_.end_span(done.row + begin, end - begin, c);
  }

  const LinearW4Problem& p_;
  alignas(64) uint8_t weights_[C][kGroupSteps * kTileBytes];
  alignas(64) int32_t products_[C][D][kTileRows * kAtomRows];
  BlockOutputs<AmxVectors, C, kChunkTiles * kTileRows> outputs_;
};

template <class Tiles, int B, int D, bool kZeros>
void multiply_tiles(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                    int64_t block_end) {
  constexpr int kBlocks = 2;
  int64_t block = block_begin;
  for (; block + kBlocks <= block_end; block += kBlocks)
    AmxBlocks<Tiles, B, D, kBlocks, kZeros>(p, row_begin, row_end, block).run();
  if (block < block_end) AmxBlocks<Tiles, B, D, 1, kZeros>(p, row_begin, row_end, block).run();
}

template <class Tiles, int B, int D>
void multiply_amx_rows(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                       int64_t block_end) {
  if (row_end - row_begin > kUntiledRows) {
    Tiles::begin();
    while (row_end - row_begin > kUntiledRows) {
      const int64_t left = row_end - row_begin, rows = left < kChunkTiles * kTileRows ? left : kChunkTiles * kTileRows;
      const auto multiply = p.zeros ? multiply_tiles<Tiles, B, D, true> : multiply_tiles<Tiles, B, D, false>;
      multiply(p, row_begin, row_begin + rows, block_begin, block_end);
      row_begin += rows;
    }
    Tiles::end();
  }
  multiply_rows<AmxVectors, B, D>(p, row_begin, row_end, block_begin, block_end);
}

template <class Tiles>
void multiply_amx(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                  int64_t block_end) {
  with_bits_and_digits(p, [&](auto b, auto d) {
    multiply_amx_rows<Tiles, decltype(b)::value, decltype(d)::value>(p, row_begin, row_end, block_begin, block_end);
  });
}

}  // namespace
}  // namespace gptq
