// Slow, obvious references of the packed operators: in float64, and bit for bit.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "gptq/pack_w4.h"

namespace gptq::reference {

/// A random weight of 4 or 8 bits. Scales have both signs; codes and zeros, where there are any, take every value.
struct W4Weight {
  at::Tensor codes, packed, scales;
  std::optional<at::Tensor> zeros;
  int64_t group_size;
  int bits = 4;
};

inline W4Weight random_w4_weight(int64_t n, int64_t k, int64_t group_size, bool with_zeros, uint64_t seed,
                                 int bits = 4) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  const int64_t groups = group_size == -1 || group_size > k ? (k > 0) : (k + group_size - 1) / group_size;
  W4Weight weight;
  weight.codes = at::randint(0, 1 << bits, {n, k}, generator, at::kByte);
  weight.packed = bits == 8 ? pack_w8(weight.codes) : pack_w4(weight.codes);
  weight.scales = (at::randn({groups, n}, generator) * 0.02).to(at::kHalf);
  if (with_zeros) weight.zeros = at::randint(0, 1 << bits, {groups, n}, generator, at::kByte);
  weight.group_size = group_size;
  weight.bits = bits;
  return weight;
}

/// f64 [N, K]
inline at::Tensor dequantize_w4(const W4Weight& weight) {
  const int64_t n = weight.codes.size(0), k = weight.codes.size(1);
  const uint8_t* codes = weight.codes.const_data_ptr<uint8_t>();
  const uint8_t* zeros = weight.zeros ? weight.zeros->const_data_ptr<uint8_t>() : nullptr;
  const at::Half* scales = weight.scales.const_data_ptr<at::Half>();
  at::Tensor result = at::empty({n, k}, at::kDouble);
  double* w = result.mutable_data_ptr<double>();
  for (int64_t row = 0; row < n; ++row)
    for (int64_t column = 0; column < k; ++column) {
      const int64_t group = weight.group_size == -1 ? 0 : column / weight.group_size;
      const int zero = zeros ? zeros[group * n + row] : 1 << (weight.bits - 1);
      w[row * k + column] = (codes[row * k + column] - zero) * static_cast<double>(scales[group * n + row]);
    }
  return result;
}

/// f64 [M, N]
inline at::Tensor linear_w4(const at::Tensor& x, const W4Weight& weight, const std::optional<at::Tensor>& bias = {}) {
  const at::Tensor y = x.to(at::kDouble).matmul(dequantize_w4(weight).t());
  return bias ? y + bias->to(at::kDouble) : y;
}

/// A bound on |linear_w4 - reference::linear_w4|, f64 [M, N], from the arithmetic in ops/linear_w4.h.
///
/// With u = 2^-24, per element: X is off x·(127·256^(D-1)/a) by one half (rounding to an integer) and 2u|x| (r, and the
/// product with it), and s_x is off by u|x|; the rounding inside v adds less than 1% to the half. Summed over k with
/// |w| that is (0.51·a/(127·256^(D-1)) + 3u|x|)·|w|. Each group's term is then rounded in v, in v·s_w and in the fma of
/// it and of all later groups, spans and the bias. The output dtype rounds once more. 1.01 covers products of these.
inline at::Tensor linear_w4_bound(const at::Tensor& x, const W4Weight& weight, int digits, at::ScalarType out) {
  constexpr double kUnit = 0x1p-24;
  const at::Tensor w = dequantize_w4(weight).abs(), magnitude = x.to(at::kDouble).abs();
  const int64_t k = x.size(1), width = weight.group_size == -1 ? k : weight.group_size;
  at::Tensor step = at::zeros_like(magnitude);
  int64_t additions = 4;
  for (int64_t begin = 0; begin < k; begin += width)
    for (int64_t from = begin; from < std::min(begin + width, k); from += 128) {
      const int64_t end = std::min({from + 128, begin + width, k});
      step.slice(1, from, end) = std::get<0>(magnitude.slice(1, from, end).max(1, true));
      ++additions;
    }
  additions += k / 1024 + 1;
  step *= 0.51 / (127.0 * std::pow(256.0, digits - 1));
  const at::Tensor per_element = (step + 3 * kUnit * magnitude).matmul(w.t());
  const at::Tensor sums = (additions * kUnit) * magnitude.matmul(w.t());
  const double unit_out = out == at::kBFloat16 ? 0x1p-8 : out == at::kHalf ? 0x1p-11 : 0.0;
  const double smallest_out = out == at::kHalf ? 0x1p-25 : 0.0;
  return 1.01 * (per_element + sums + unit_out * linear_w4(x, weight).abs()) + smallest_out;
}

/// The digits of one activation group and its scale, step 2 of the arithmetic in ops/linear_w4.h, one value at a time.
struct SplitGroup {
  float scale;
  std::vector<std::vector<int64_t>> digits;  // [D][columns]
};

inline SplitGroup split_group(const float* x, int64_t columns, int digits) {
  SplitGroup result{0.0f, std::vector<std::vector<int64_t>>(digits, std::vector<int64_t>(columns, 0))};
  float largest = 0;
  for (int64_t k = 0; k < columns; ++k) {
    if (!std::isfinite(x[k])) return {std::nanf(""), result.digits};
    largest = std::max(largest, std::fabs(x[k]));
  }
  if (largest == 0) return result;
  result.scale = largest / 127.0f;
  const float lift = largest < std::ldexp(1.0f, -64) ? std::ldexp(1.0f, 80) : 1.0f;
  const float ratio = std::ldexp(127.0f, 8 * (digits - 1)) / (largest * lift);
  for (int64_t k = 0; k < columns; ++k) {
    auto value = static_cast<int64_t>(std::nearbyint(x[k] * lift * ratio));
    for (int d = 0; d < digits; ++d) {
      const int64_t digit = (((value + 128) % 256) + 256) % 256 - 128;
      result.digits[d][k] = digit;
      value = (value - digit) / 256;
    }
  }
  return result;
}

/// The bits of linear_w4 on f32 input [M, K] and f32 bias: f32 [M, N].
inline at::Tensor linear_w4_model(const at::Tensor& x, const W4Weight& weight, const std::optional<at::Tensor>& bias,
                                  int digits) {
  const int64_t m = x.size(0), k = x.size(1), n = weight.codes.size(0);
  const int64_t width = weight.group_size == -1 ? k : weight.group_size;
  at::Tensor y = at::empty({m, n}, at::kFloat);
  for (int64_t row = 0; row < m; ++row)
    for (int64_t column = 0; column < n; ++column) {
      const uint8_t* codes = weight.codes.const_data_ptr<uint8_t>() + column * k;
      float total = 0, partial = 0;
      for (int64_t begin = 0, end = 0; begin < k; begin = end) {
        const int64_t group = begin / width;
        end = std::min({begin + 128, (group + 1) * width, k});
        const SplitGroup split = split_group(x.const_data_ptr<float>() + row * k + begin, end - begin, digits);
        const int zero =
            weight.zeros ? weight.zeros->const_data_ptr<uint8_t>()[group * n + column] : 1 << (weight.bits - 1);
        std::vector<int64_t> j(3, 0);
        for (int d = 0; d < digits; ++d)
          for (int64_t i = begin; i < end; ++i) j[d] += (codes[i] - zero) * split.digits[d][i - begin];
        float v = static_cast<float>(j[0]);
        if (digits == 2) v = std::fma(v, 1 / 256.0f, static_cast<float>(j[1]));
        if (digits == 3) v = std::fma(static_cast<float>(256 * j[1] + j[0]), 1 / 65536.0f, static_cast<float>(j[2]));
        const float scale = weight.scales.const_data_ptr<at::Half>()[group * n + column];
        partial = std::fma(v * scale, split.scale, partial);
        if (end == k || begin / 1024 != end / 1024) {
          total += partial;
          partial = 0;
        }
      }
      if (bias) total += bias->const_data_ptr<float>()[column];
      y.mutable_data_ptr<float>()[row * n + column] = total;
    }
  return y;
}

}  // namespace gptq::reference
