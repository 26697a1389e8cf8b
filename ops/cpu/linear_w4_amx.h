// linear_w4 for AMX: from five rows on, tiles of 16 rows of x and 16 columns of y, their int8 digits multiplied 64
// columns of the weight at a time. Fewer rows are computed by AVX512-VNNI. Tiles is what executes the tile
// instructions:
//   begin(), end()                            around all others, in the thread that uses them
//   zero<C>(), load<T>(from, stride), store<C>(to)
//   multiply<C, A, B>()                       tile C += signed bytes of A · unsigned bytes of B
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

// C blocks of 16 columns, over some row tiles.
template <class Tiles, int B, int D, int C>
class AmxBlocks {
 public:
  AmxBlocks(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block)
      : p_(p), outputs_(p, row_begin, row_end, block) {}

  // The sums of a tile are finished while the next one's products run.
  void run() {
    const int64_t tiles = ceil_div(outputs_.row_end - outputs_.row_begin, kTileRows);
    int64_t pending_group = -1, pending_tile = 0;
    for (int64_t g = 0; g < p_.n_groups; ++g) {
      unpack(p_.groups[g]);
      for (int64_t t = 0; t < tiles; ++t) {
        multiply(p_.groups[g], t);
        if (pending_group >= 0) add_up(pending_group, pending_tile);
        store_all<0>();
        pending_group = g;
        pending_tile = t;
      }
    }
    if (pending_group >= 0) add_up(pending_group, pending_tile);
    outputs_.write();
  }

 private:
  using Isa = AmxVectors;

  // Codes of the group's columns as bytes, zero behind its last atom.
  void unpack(const LinearW4Group& group) {
    const int64_t block_stride = ceil_div(p_.k, kAtomColumns) * atom_bytes(B);
    for (int c = 0; c < C; ++c) {
      const uint8_t* from = p_.packed + (outputs_.block + c) * block_stride + group.first_atom * atom_bytes(B);
      uint8_t* to = weights_[c];
      for (int64_t i = 0; i < group.atoms; ++i, to += 2 * kLineBytes) {
        prefetch_codes<B>(from + i * atom_bytes(B));
        for (int half = 0; half < 2; ++half)
          _mm512_store_si512(to + half * kLineBytes, Isa::template load_codes<B>(from + i * atom_bytes(B), half));
      }
      const int64_t end = ceil_div(group.atoms, kStepAtoms) * kTileBytes;
      __builtin_memset(to, 0, weights_[c] + end - to);
    }
  }

  // Tiles 0 .. C·D - 1 hold the products, 6 digits and 7 codes.
  void multiply(const LinearW4Group& group, int64_t tile) {
    const int8_t* digits =
        p_.x_digits + (outputs_.row_begin + tile * kTileRows) * p_.digit_stride + group.digit_atom * D * kAtomColumns;
    zero_all<0>();
    for (int64_t step = 0; step * kStepAtoms < group.atoms; ++step) {
      for_each_block<0>(digits + step * kStepAtoms * kAtomColumns, group.atoms * kAtomColumns, step);
    }
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
  void for_each_block(const int8_t* digits, int64_t plane, int64_t step) {
    if constexpr (I < C) {
      Tiles::template load<7>(weights_[I] + step * kTileBytes, kLineBytes);
      for_each_digit<I, 0>(digits, plane);
      for_each_block<I + 1>(digits, plane, step);
    }
  }

  template <int Block, int I>
  void for_each_digit(const int8_t* digits, int64_t plane) {
    if constexpr (I < D) {
      Tiles::template load<6>(digits + I * plane, p_.digit_stride);
      Tiles::template multiply<Block * D + I, 6, 7>();
      for_each_digit<Block, I + 1>(digits, plane);
    }
  }

  // Step 3 of the arithmetic in linear_w4.h.
  void add_up(int64_t g, int64_t tile) {
    const LinearW4Group& group = p_.groups[g];
    const int64_t first = outputs_.row_begin + tile * kTileRows;
    const int64_t rows = outputs_.row_end - first < kTileRows ? outputs_.row_end - first : kTileRows;
    for (int c = 0; c < C; ++c) {
      const int64_t parameters = group.weight_group * p_.n + (outputs_.block + c) * kAtomRows;
      const auto scale = Isa::load_f16(p_.scales + parameters, outputs_.lanes(c));
      const auto zero = p_.zeros ? Isa::load_u8(p_.zeros + parameters, outputs_.lanes(c)) : Isa::broadcast_int(0);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (first + r) * p_.n_groups + g;
        typename Isa::Int j[D];
        for (int d = 0; d < D; ++d) {
          const int32_t sum = p_.x_offsets[at * D + d];
          const auto offset = p_.zeros ? Isa::scale_zero(zero, sum) : Isa::broadcast_int(sum);
          j[d] = _mm512_add_epi32(offset, _mm512_load_si512(products_[c][d] + r * kAtomRows));
        }
        const auto value = [&](int) { return Isa::mul(combine_digits<Isa, D>(j), scale); };
        outputs_.template add<1>(first + r, c, group.ends_span, value, [&](int) { return p_.x_scales[at]; });
      }
    }
  }

  const LinearW4Problem& p_;
  alignas(64) uint8_t weights_[C][kGroupSteps * kTileBytes];
  alignas(64) int32_t products_[C][D][kTileRows * kAtomRows];
  BlockOutputs<AmxVectors, C, kChunkTiles * kTileRows> outputs_;
};

template <class Tiles, int B, int D>
void multiply_tiles(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                    int64_t block_end) {
  constexpr int kBlocks = 2;
  int64_t block = block_begin;
  for (; block + kBlocks <= block_end; block += kBlocks)
    AmxBlocks<Tiles, B, D, kBlocks>(p, row_begin, row_end, block).run();
  if (block < block_end) AmxBlocks<Tiles, B, D, 1>(p, row_begin, row_end, block).run();
}

template <class Tiles, int B, int D>
void multiply_amx_rows(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                       int64_t block_end) {
  if (row_end - row_begin > kUntiledRows) {
    Tiles::begin();
    while (row_end - row_begin > kUntiledRows) {
      const int64_t left = row_end - row_begin, rows = left < kChunkTiles * kTileRows ? left : kChunkTiles * kTileRows;
      multiply_tiles<Tiles, B, D>(p, row_begin, row_begin + rows, block_begin, block_end);
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
