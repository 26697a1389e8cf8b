#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace gptq {

/// Packs 4-bit codes into the one layout that every kernel reads.
///
/// The layout, version kW4FormatVersion, is made of atoms of 64 bytes, each 16 rows (n) by 8 columns (k) of the weight:
/// 16 little-endian dwords, one per row, whose nibbles from the least significant hold columns
/// k0, k4, k1, k5, k2, k6, k3, k7. Rows and columns beyond N and K hold code 0. The bytes do not depend on the machine.
///
/// @param codes u8 [N, K], every value in 0..15
/// @return u8 [ceil(N/16), ceil(K/8), 64]
/// @throws c10::Error for another dtype or rank, and for a code above 15
at::Tensor pack_w4(const at::Tensor& codes);

/// The codes of a packed weight: the inverse of pack_w4.
/// @param packed u8 [ceil(n/16), ceil(k/8), 64]
/// @return u8 [n, k]
/// @throws c10::Error where packed has not the shape that n and k ask for
at::Tensor unpack_w4(const at::Tensor& packed, int64_t n, int64_t k);

/// The float weight that a packed one stands for: (code - zero) * scale of its group.
///
/// @param packed u8 [ceil(N/16), ceil(k/8), 64]
/// @param scales f16 [n_groups, N]
/// @param zeros u8 [n_groups, N]; absent means 8 everywhere
/// @param group_size columns per group, as in linear_w4; 0: all n_groups groups are equally wide, which needs k to be a
///        multiple of n_groups
/// @return f32 [N, k], every value exact
/// @throws c10::Error for another dtype or shape
at::Tensor dequantize_w4(const at::Tensor& packed, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                         int64_t k, int64_t group_size = 0);

inline constexpr int64_t kW4FormatVersion = 1;

/// As pack_w4, unpack_w4 and dequantize_w4, for codes of 8 bits (or 5 to 7, in bytes too).
///
/// An atom has 128 bytes: two times 16 groups of four bytes, one per row, the first with columns k0 .. k3, the second
/// with k4 .. k7.
///
/// @param codes u8 [N, K]
/// @return u8 [ceil(N/16), ceil(K/8), 128]
at::Tensor pack_w8(const at::Tensor& codes);

/// @param packed u8 [ceil(n/16), ceil(k/8), 128]
/// @return u8 [n, k]
at::Tensor unpack_w8(const at::Tensor& packed, int64_t n, int64_t k);

/// @param packed u8 [ceil(N/16), ceil(k/8), 128]
/// @param zeros u8 [n_groups, N]; absent means 128 everywhere
/// @return f32 [N, k], every value exact
at::Tensor dequantize_w8(const at::Tensor& packed, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                         int64_t k, int64_t group_size = 0);

}  // namespace gptq
