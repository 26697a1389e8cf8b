// Checkpoint formats one number and one bit at a time, for tests: slow, and apart from the library's own packing.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "model/coded_weight.h"

namespace gptq::test {

/// Bit b of field f of a column's stream is bit (f bits + b) of its words, the lowest first.
/// @param values [F][C]
/// @return i32 [ceil(F bits / 32), C], bits that no field fills 0
inline at::Tensor reference_pack(const std::vector<std::vector<int64_t>>& values, int64_t bits) {
  const auto fields = static_cast<int64_t>(values.size()), columns = static_cast<int64_t>(values[0].size());
  at::Tensor words = at::zeros({(fields * bits + 31) / 32, columns}, at::kLong);
  auto word = words.accessor<int64_t, 2>();
  for (int64_t field = 0; field < fields; ++field) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t bit = 0; bit < bits; ++bit) {
        const int64_t position = field * bits + bit;
        const int64_t value = values[static_cast<size_t>(field)][static_cast<size_t>(column)] >> bit & 1;
        word[position / 32][column] += value << (position % 32);
      }
    }
  }
  // To the signed number of the same bits.
  return at::where(words.ge(int64_t{1} << 31), words.sub(int64_t{1} << 32), words).to(at::kInt);
}

/// The inverse of reference_pack, where the fields fill whole words.
inline std::vector<std::vector<int64_t>> reference_unpack(const at::Tensor& words, int64_t bits) {
  const at::Tensor wide = words.to(at::kLong).contiguous();
  const auto word = wide.accessor<int64_t, 2>();
  std::vector<std::vector<int64_t>> values(static_cast<size_t>(words.size(0) * 32 / bits));
  for (size_t field = 0; field < values.size(); ++field) {
    for (int64_t column = 0; column < words.size(1); ++column) {
      int64_t value = 0;
      for (int64_t bit = 0; bit < bits; ++bit) {
        const int64_t position = static_cast<int64_t>(field) * bits + bit;
        value += (word[position / 32][column] >> (position % 32) & 1) << bit;
      }
      values[field].push_back(value);
    }
  }
  return values;
}

/// f32 [N, K]: what the weight stands for, columns where the linear has them.
inline at::Tensor dequantized(const CodedWeight& weight) {
  const int64_t k = weight.codes.size(1);
  at::Tensor result = at::empty(weight.codes.sizes());
  for (int64_t column = 0; column < k; ++column) {
    const int64_t group = weight.group_size == -1 ? 0 : column / weight.group_size;
    const int64_t place = weight.input_order ? (*weight.input_order)[column].item<int64_t>() : column;
    result.select(1, place).copy_((weight.codes.select(1, column).to(at::kFloat) - weight.zeros[group].to(at::kFloat)) *
                                  weight.scales[group].to(at::kFloat));
  }
  return result;
}

}  // namespace gptq::test
