#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>

#include <algorithm>

#include "quant/pull_kernel.h"

namespace gptq {

/// Strips that a thread works on side by side, so that what they all pull is read once for all of them, and how many
/// columns they pull at a time then.
inline constexpr int64_t kStripsTogether = 4;
inline constexpr int64_t kPulledColumns = 512;

/// Strips that n rows make.
template <typename T>
int64_t strip_count(int64_t n) {
  return (n + kStripRows<T> - 1) / kStripRows<T>;
}

/// Turns rows into a strip, [n_columns][kStripRows]: out[c][r] = convert(rows[r][c]). Lanes without a row hold
/// convert(0).
template <typename T, typename From, typename Convert>
void load_strip(const From* rows, int64_t n_rows, int64_t n_columns, int64_t stride, T* strip, const Convert& convert) {
  constexpr int64_t lanes = kStripRows<T>, tile = 16;  // columns that are written side by side
  for (int64_t first = 0; first < n_columns; first += tile) {
    const int64_t last = std::min(first + tile, n_columns);
    for (int64_t r = 0; r < n_rows; ++r) {
      for (int64_t c = first; c < last; ++c) {
        strip[c * lanes + r] = convert(rows[r * stride + c]);
      }
    }
    for (int64_t c = first; c < last; ++c) {
      std::fill(strip + c * lanes + n_rows, strip + (c + 1) * lanes, convert(From(0)));
    }
  }
}

/// The reverse: rows[r][c] = convert(strip[c][r]), for the n_rows lanes that have a row. A column of the strip has
/// kLanes values.
template <int64_t kLanes, typename From, typename To, typename Convert>
void store_lanes(const From* strip, int64_t n_rows, int64_t n_columns, To* rows, int64_t stride,
                 const Convert& convert) {
  constexpr int64_t tile = 64;
  for (int64_t first = 0; first < n_columns; first += tile) {
    const int64_t last = std::min(first + tile, n_columns);
    for (int64_t r = 0; r < n_rows; ++r) {
      for (int64_t c = first; c < last; ++c) {
        rows[r * stride + c] = convert(strip[c * kLanes + r]);
      }
    }
  }
}

template <typename T, typename Convert>
void store_strip(const T* strip, int64_t n_rows, int64_t n_columns, T* rows, int64_t stride, const Convert& convert) {
  store_lanes<kStripRows<T>>(strip, n_rows, n_columns, rows, stride, convert);
}

/// What every group of every row has, [n_groups, N], as strips [n_strips, n_groups, kStripRows]. Lanes without a row
/// hold pad.
template <typename T>
at::Tensor groups_to_strips(const at::Tensor& groups, double pad) {
  const int64_t n = groups.size(1), n_strips = strip_count<T>(n);
  const at::Tensor padded =
      at::constant_pad_nd(groups.to(c10::CppTypeToScalarType<T>::value), {0, n_strips * kStripRows<T> - n}, pad);
  return padded.view({groups.size(0), n_strips, kStripRows<T>}).transpose(0, 1).contiguous();
}

/// Overwrites groups, [n_groups, N], with what groups_to_strips made of it.
inline void groups_from_strips(const at::Tensor& strips, at::Tensor& groups) {
  groups.copy_(strips.transpose(0, 1).reshape({groups.size(0), -1}).narrow(1, 0, groups.size(1)));
}

template <typename T>
T* strip_data(const at::Tensor& strips, int64_t strip) {
  return strips.data_ptr<T>() + strip * strips.size(1) * kStripRows<T>;
}

}  // namespace gptq
