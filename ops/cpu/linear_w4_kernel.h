// The loops that all CPU kernels of linear_w4 and linear_w8 share; B is the bits of a code, D the digits of an input.
// An instruction set is a type Isa with
//   Int, Float             16 lanes, one per column of a block
//   rows(D), blocks(R, D)  largest register tile: rows of x, and blocks of 16 columns beside each other
//   max_magnitude, split   step 2 of the arithmetic in linear_w4.h, over vectors of 16 values and over atoms
//   dot                    step 3, one activation group
//   scale_zero             zero points times their x_offsets, which fit 16 bits where there are any: at most 128·128
//   and the other lane-wise operations that split_group and multiply_tile use.
// Everything is in an unnamed namespace: each kernel file is compiled for its own instruction set, and the linker must
// not keep one file's copy for another.
#pragma once

#include "linear_w4.h"

namespace gptq {
namespace {

// A group of 128 columns that starts inside an atom covers 17 atoms, in 9 vectors.
constexpr int64_t kPaddedGroup = 144;

constexpr float digit_range(int digits) {
  return digits == 1 ? 127.0f : digits == 2 ? 32512.0f : 8323072.0f;
}

template <class T>
void copy_columns(const T* row, const int32_t* order, int64_t begin, int64_t width, T* to) {
  if (order == nullptr) {
    __builtin_memcpy(to, row + begin, sizeof(T) * width);
    return;
  }
  for (int64_t i = 0; i < width; ++i) to[i] = row[order[begin + i]];
}

// The group's columns from the start of its first atom on, zero outside the group, in padded if not as they lie in x.
template <class T>
const T* group_columns(const LinearW4Problem& p, int64_t row, const LinearW4Group& group, T* padded) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const int64_t offset = group.begin - kAtomColumns * group.first_atom;
  const int64_t width = group.end - group.begin;
  if (p.order == nullptr && offset == 0 && width % 16 == 0) return x + group.begin;
  __builtin_memset(padded, 0, sizeof(T) * kPaddedGroup);
  copy_columns(x, p.order, group.begin, width, padded + offset);
  return padded;
}

// The same as float32, for whole vectors.
template <class Isa>
const float* group_values(const LinearW4Problem& p, int64_t row, const LinearW4Group& group, float* padded) {
  if (p.type == LinearW4Type::kF32) return group_columns(p, row, group, padded);
  uint16_t halves[kPaddedGroup];
  const uint16_t* from = group_columns(p, row, group, halves);
  const bool is_bf16 = p.type == LinearW4Type::kBf16;
  for (int64_t i = 0; i < kAtomColumns * group.atoms; i += 16)
    Isa::store(padded + i, is_bf16 ? Isa::load_bf16(from + i, 16) : Isa::load_f16(from + i, 16), 16);
  return padded;
}

// values are of whole vectors; bits are of the largest magnitude among them.
template <class Isa, int D>
void split_group(const LinearW4Problem& p, const LinearW4Group& group, const float* values, uint32_t bits,
                 int8_t* digits, float* scale, int32_t* sums) {
  float magnitude;
  __builtin_memcpy(&magnitude, &bits, sizeof(bits));
  constexpr uint32_t kInfinityBits = 0x7f800000;
  if (bits == 0 || bits >= kInfinityBits) {
    *scale = bits == 0 ? 0.0f : __builtin_nanf("");
    __builtin_memset(digits, 0, group.atoms * D * kAtomColumns);
    __builtin_memset(sums, 0, sizeof(int32_t) * D);
    return;
  }
  const float lift = magnitude < 0x1p-64f ? 0x1p80f : 1.0f;
  *scale = magnitude / 127.0f;
  Isa::template split<D>(values, group.atoms, lift, digit_range(D) / (magnitude * lift), digits, sums);
  const int32_t factor = p.zeros ? -1 : -middle_code(p.bits);
  for (int d = 0; d < D; ++d) sums[d] *= factor;
}

// Maxima come late, and so do quotients: those of several groups are waited for together.
template <class Isa, int D>
void split_rows(const LinearW4Problem& p, int64_t row_begin, int64_t row_end) {
  constexpr int64_t kTogether = 8;
  alignas(64) float padded[kTogether][kPaddedGroup];
  const float* values[kTogether];
  uint32_t largest[kTogether];
  for (int64_t row = row_begin; row < row_end; ++row) {
    int8_t* digits = p.x_digits + row * p.digit_stride;
    for (int64_t first = 0; first < p.n_groups; first += kTogether) {
      const int64_t count = p.n_groups - first < kTogether ? p.n_groups - first : kTogether;
      for (int64_t i = 0; i < count; ++i) {
        const LinearW4Group& group = p.groups[first + i];
        values[i] = group_values<Isa>(p, row, group, padded[i]);
        largest[i] = Isa::max_magnitude(values[i], (group.atoms + 1) / 2);
      }
      for (int64_t i = 0; i < count; ++i) {
        const LinearW4Group& group = p.groups[first + i];
        const int64_t at = row * p.n_groups + first + i;
        split_group<Isa, D>(p, group, values[i], largest[i], digits + group.digit_atom * D * kAtomColumns,
                            p.x_scales + at, p.x_offsets + at * D);
      }
    }
  }
}

// Blocks are too far apart for the processor to see where the next page is read: from memory, one to four rows are 1.1
// to 1.6 times as fast with this; in cache one row is a tenth slower, with one digit a sixth.
template <int B>
inline void prefetch_codes(const uint8_t* atom) {
  constexpr int64_t kAhead = 2048, kLine = 64;  // bytes
  for (int64_t line = 0; line < atom_bytes(B); line += kLine) __builtin_prefetch(atom + kAhead + line);
}

template <class Isa, int D>
inline typename Isa::Float combine_digits(const typename Isa::Int (&j)[D]) {
  if constexpr (D == 1) {
    return Isa::to_float(j[0]);
  } else if constexpr (D == 2) {
    return Isa::fma(Isa::to_float(j[0]), Isa::broadcast(0x1p-8f), Isa::to_float(j[1]));
  } else {
    return Isa::fma(Isa::to_float(Isa::shift8_add(j[1], j[0])), Isa::broadcast(0x1p-16f), Isa::to_float(j[2]));
  }
}

template <class Isa>
[[gnu::always_inline]] inline void store_outputs(const LinearW4Problem& p, int64_t at, typename Isa::Float values,
                                                 int64_t count) {
  switch (p.type) {
    case LinearW4Type::kF32:
      return Isa::store(static_cast<float*>(p.y) + at, values, count);
    case LinearW4Type::kBf16:
      return Isa::store_bf16(static_cast<uint16_t*>(p.y) + at, values, count);
    case LinearW4Type::kF16:
      return Isa::store_f16(static_cast<uint16_t*>(p.y) + at, values, count);
  }
}

// Step 4 of the arithmetic in linear_w4.h for C blocks and at most kRows rows, group by group.
template <class Isa, int C, int kRows>
struct BlockOutputs {
  using Float = typename Isa::Float;

  BlockOutputs(const LinearW4Problem& problem, int64_t begin, int64_t end, int64_t first_block)
      : p(problem), row_begin(begin), row_end(end), block(first_block) {
    for (int64_t r = 0; r < row_end - row_begin; ++r)
      for (int c = 0; c < C; ++c) {
        Isa::store(y[r][c], Isa::broadcast(0.0f), kAtomRows);
        Isa::store(partial[r][c], Isa::broadcast(0.0f), kAtomRows);
      }
  }

  int64_t lanes(int c) const {
    const int64_t left = p.n - (block + c) * kAtomRows;
    return left < kAtomRows ? left : kAtomRows;
  }

  // p = fma(v·s_w, s_x, p) of R rows from the row-th of these on; value(r) is v·s_w, x_scale(r) is s_x.
  template <int R, class Value, class Scale>
  [[gnu::always_inline]] void add(int64_t row, int c, const Value& value, const Scale& x_scale) {
    float* part = partial[row][c];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      float* at = part + r * kRow;
      Isa::store(at, Isa::fma(value(r), Isa::broadcast(x_scale(r)), Isa::load(at, kAtomRows)), kAtomRows);
    }
  }

  // y = y + p, p = +0.
  void end_span(int64_t row, int64_t rows, int c) {
    float *part = partial[row][c], *to = y[row][c];
    for (int64_t r = 0; r < rows; ++r) {
      Isa::store(to + r * kRow, Isa::add(Isa::load(to + r * kRow, kAtomRows), Isa::load(part + r * kRow, kAtomRows)),
                 kAtomRows);
      Isa::store(part + r * kRow, Isa::broadcast(0.0f), kAtomRows);
    }
  }

  void write() const {
    const LinearW4Problem problem = p;  // no store can change it, so that it stays in registers
    const int64_t rows = row_end - row_begin;
    for (int c = 0; c < C; ++c) {
      const int64_t column = (block + c) * kAtomRows, count = lanes(c);
      const Float bias = problem.bias ? Isa::load(problem.bias + column, count) : Isa::broadcast(0.0f);
      for (int64_t r = 0; r < rows; ++r) {
        Float values = Isa::load(y[r][c], kAtomRows);
        if (problem.bias) values = Isa::add(values, bias);
        store_outputs<Isa>(problem, (row_begin + r) * problem.n + column, values, count);
      }
    }
  }

  static constexpr int64_t kRow = C * kAtomRows;

  const LinearW4Problem& p;
  int64_t row_begin, row_end, block;
  alignas(64) float partial[kRows][C][kAtomRows];
  alignas(64) float y[kRows][C][kAtomRows];
};

// kTail: whether the last block has fewer than 16 columns.
template <class Isa, int B, int D, int R, int C, bool kTail>
void multiply_tile(const LinearW4Problem& p, int64_t row, int64_t block) {
  using Int = typename Isa::Int;
  using Float = typename Isa::Float;
  const int64_t column = block * kAtomRows;
  const int64_t block_stride = ceil_div(p.k, kAtomColumns) * atom_bytes(B);
  const uint8_t* weights = p.packed + block * block_stride;
  const int8_t* digits = p.x_digits + row * p.digit_stride;
  const auto lanes = [&](int c) { return kTail ? p.n - column - c * kAtomRows : kAtomRows; };

  Float y[R][C], partial[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) y[r][c] = partial[r][c] = Isa::broadcast(0.0f);

  for (int64_t g = 0; g < p.n_groups; ++g) {
    const LinearW4Group& group = p.groups[g];
    const int64_t at = row * p.n_groups + g;
    const int64_t parameters = group.weight_group * p.n + column;
    Int j[R][C][D];
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) {
      Int zero;
      if (p.zeros) zero = Isa::load_u8(p.zeros + parameters + c * kAtomRows, lanes(c));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
          const int32_t offset = p.x_offsets[(at + r * p.n_groups) * D + d];
          j[r][c][d] = p.zeros ? Isa::scale_zero(zero, offset) : Isa::broadcast_int(offset);
        }
    }
    asm("" : "+m"(y), "+m"(partial));  // leaves all registers to j
    Isa::template dot<B>(j, weights + group.first_atom * atom_bytes(B), block_stride,
                         digits + group.digit_atom * D * kAtomColumns, p.digit_stride, group.atoms);
#pragma GCC unroll 6
    for (int c = 0; c < C; ++c) {
      const Float scale = Isa::load_f16(p.scales + parameters + c * kAtomRows, lanes(c));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Float x_scale = Isa::broadcast(p.x_scales[at + r * p.n_groups]);
        partial[r][c] = Isa::fma(Isa::mul(combine_digits<Isa, D>(j[r][c]), scale), x_scale, partial[r][c]);
      }
    }
    if (group.ends_span) {
      for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) {
          y[r][c] = Isa::add(y[r][c], partial[r][c]);
          partial[r][c] = Isa::broadcast(0.0f);
        }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      const int64_t to = column + c * kAtomRows;
      if (p.bias) y[r][c] = Isa::add(y[r][c], Isa::load(p.bias + to, lanes(c)));
      store_outputs<Isa>(p, (row + r) * p.n + to, y[r][c], lanes(c));
    }
}

template <class Isa, int B, int D, int R>
void multiply_row_tile(const LinearW4Problem& p, int64_t row, int64_t rows, int64_t block, int64_t block_end) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_row_tile<Isa, B, D, R - 1>(p, row, rows, block, block_end);
  }
  constexpr int C = Isa::blocks(R, D);
  const int64_t full = p.n / kAtomRows, full_end = block_end < full ? block_end : full;
  for (; block + C <= full_end; block += C) multiply_tile<Isa, B, D, R, C, false>(p, row, block);
  if constexpr (C > 1) {
    for (; block < full_end; ++block) multiply_tile<Isa, B, D, R, 1, false>(p, row, block);
  }
  if (block < block_end) multiply_tile<Isa, B, D, R, 1, true>(p, row, block);
}

// Rows of the next tile of at most most rows: 3 and 2 rather than 4 and 1.
inline int64_t even_share(int64_t left, int64_t most) {
  return ceil_div(left, ceil_div(left, most));
}

template <class Isa, int B, int D>
void multiply_rows(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                   int64_t block_end) {
  constexpr int64_t kPanel = 4;  // blocks whose weights stay in cache while the rows pass over them
  for (int64_t block = block_begin; block < block_end; block += kPanel) {
    const int64_t panel_end = block + kPanel < block_end ? block + kPanel : block_end;
    for (int64_t row = row_begin, rows; row < row_end; row += rows) {
      rows = even_share(row_end - row, Isa::rows(D));
      multiply_row_tile<Isa, B, D, Isa::rows(D)>(p, row, rows, block, panel_end);
    }
  }
}

template <int I>
struct Constant {
  static constexpr int value = I;
};

// Calls body(Constant<D>()) for the D that digits is.
template <class Body>
void with_digits(int digits, const Body& body) {
  if (digits == 1) return body(Constant<1>());
  if (digits == 2) return body(Constant<2>());
  body(Constant<3>());
}

// Calls body(Constant<B>(), Constant<D>()) for the problem's bits and digits.
template <class Body>
void with_bits_and_digits(const LinearW4Problem& p, const Body& body) {
  with_digits(p.digits, [&](auto d) { p.bits == 8 ? body(Constant<8>(), d) : body(Constant<4>(), d); });
}

template <class Isa>
void split_entry(const LinearW4Problem& p, int64_t row_begin, int64_t row_end) {
  with_digits(p.digits, [&](auto d) { split_rows<Isa, decltype(d)::value>(p, row_begin, row_end); });
}

template <class Isa>
void multiply_entry(const LinearW4Problem& p, int64_t row_begin, int64_t row_end, int64_t block_begin,
                    int64_t block_end) {
  with_bits_and_digits(p, [&](auto b, auto d) {
    multiply_rows<Isa, decltype(b)::value, decltype(d)::value>(p, row_begin, row_end, block_begin, block_end);
  });
}

}  // namespace
}  // namespace gptq
