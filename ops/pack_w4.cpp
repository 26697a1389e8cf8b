#include "gptq/pack_w4.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "linear_w4.h"
#include "pack_w4_any.h"

namespace gptq {
namespace {

// Where the codes of one width are in an atom, and how its operators are called.
struct Nibbles {
  static constexpr int kBits = 4;
  static constexpr const char *kPack = "pack_w4", *kUnpack = "unpack_w4", *kDequantize = "dequantize_w4";
  static constexpr const char* kShape = "[ceil(N/16), ceil(K/8), 64]";

  // Bits [4i, 4i + 4) of the row's dword.
  static constexpr int kNibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  static int64_t byte(int64_t row, int64_t column) { return 4 * row + kNibble[column] / 2; }
  static int shift(int64_t column) { return 4 * (kNibble[column] % 2); }
};

struct Bytes {
  static constexpr int kBits = 8;
  static constexpr const char *kPack = "pack_w8", *kUnpack = "unpack_w8", *kDequantize = "dequantize_w8";
  static constexpr const char* kShape = "[ceil(N/16), ceil(K/8), 128]";

  static int64_t byte(int64_t row, int64_t column) { return column / 4 * 64 + 4 * row + column % 4; }
  static int shift(int64_t) { return 0; }
};

template <class Codes>
constexpr int kLargest = (1 << Codes::kBits) - 1;

// Calls function(row, column, byte, shift) for every code of the 16 rows of one block.
template <class Codes, class Function>
void for_each_code(int64_t n, int64_t k, int64_t block, Function function) {
  const int64_t atoms = ceil_div(k, kAtomColumns);
  for (int64_t row = block * kAtomRows; row < std::min((block + 1) * kAtomRows, n); ++row)
    for (int64_t column = 0; column < k; ++column) {
      const int64_t atom = block * atoms + column / kAtomColumns;
      const int64_t byte = Codes::byte(row % kAtomRows, column % kAtomColumns);
      function(row, column, atom * atom_bytes(Codes::kBits) + byte, Codes::shift(column % kAtomColumns));
    }
}

template <class Function>
void for_each_block(int64_t n, int64_t k, Function function) {
  const int64_t blocks = ceil_div(n, kAtomRows);
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, kAtomRows * k));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) function(block);
  });
}

template <class Codes>
void check_codes(const at::Tensor& codes) {
  TORCH_CHECK(codes.scalar_type() == at::kByte, Codes::kPack, ": codes must be Byte, got ", codes.scalar_type());
  TORCH_CHECK(codes.dim() == 2, Codes::kPack, ": codes must be [N, K], got ", codes.sym_sizes());
}

template <class Codes>
void check_packed(const char* op, const at::Tensor& packed, const c10::SymInt& n, const c10::SymInt& k) {
  TORCH_CHECK(n >= 0 && k >= 0, op, ": n and k must not be negative, got n = ", n, ", k = ", k);
  TORCH_CHECK(packed.scalar_type() == at::kByte, op, ": packed must be Byte, got ", packed.scalar_type());
  const c10::SymInt shape[] = {ceil_div(n, kAtomRows), ceil_div(k, kAtomColumns),
                               c10::SymInt(atom_bytes(Codes::kBits))};
  TORCH_CHECK(packed.sym_sizes() == c10::SymIntArrayRef(shape), op, ": packed must be ", Codes::kShape, " = ",
              c10::SymIntArrayRef(shape), ", got ", packed.sym_sizes());
}

// Returns the group size that 0 stands for.
template <class Codes>
int64_t check_dequantize(const at::Tensor& packed, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                         int64_t k, int64_t group_size) {
  constexpr const char* kOp = Codes::kDequantize;
  TORCH_CHECK(scales.scalar_type() == at::kHalf, kOp, ": scales must be Half, got ", scales.scalar_type());
  TORCH_CHECK(scales.dim() == 2, kOp, ": scales must be [n_groups, N], got ", scales.sym_sizes());
  TORCH_CHECK(group_size >= -1, kOp, ": group_size must be -1, 0 or at least 1, got ", group_size);
  check_packed<Codes>(kOp, packed, scales.sym_size(1), k);
  const c10::SymInt groups = scales.sym_size(0);
  if (group_size == 0) {
    TORCH_CHECK(groups == 0 ? k == 0 : k % groups == 0, kOp, ": group_size must be given where k = ", k,
                " is not a multiple of n_groups = ", groups);
    group_size = groups == 0 ? 1 : std::max<int64_t>(1, (k / groups).guard_int(__FILE__, __LINE__));
  } else if (group_size == -1) {
    group_size = std::max<int64_t>(1, k);
  }
  const c10::SymInt shape[] = {c10::SymInt(k == 0 ? 0 : (k - 1) / group_size + 1), scales.sym_size(1)};
  TORCH_CHECK(scales.sym_sizes() == c10::SymIntArrayRef(shape), kOp,
              ": scales must be [n_groups, N] = ", c10::SymIntArrayRef(shape), ", got ", scales.sym_sizes());
  TORCH_CHECK(scales.device() == packed.device(), kOp, ": scales must be on packed's device ", packed.device(),
              ", got ", scales.device());
  if (zeros) {
    TORCH_CHECK(zeros->scalar_type() == at::kByte, kOp, ": zeros must be Byte, got ", zeros->scalar_type());
    TORCH_CHECK(zeros->sym_sizes() == scales.sym_sizes(), kOp, ": zeros must be [n_groups, N] = ", scales.sym_sizes(),
                ", got ", zeros->sym_sizes());
    TORCH_CHECK(zeros->device() == packed.device(), kOp, ": zeros must be on packed's device ", packed.device(),
                ", got ", zeros->device());
  }
  return group_size;
}

template <class Codes>
at::Tensor pack_cpu(const at::Tensor& codes) {
  check_codes<Codes>(codes);
  const int64_t n = codes.size(0), k = codes.size(1);
  const at::Tensor source = codes.contiguous();
  const uint8_t* from = source.const_data_ptr<uint8_t>();
  const uint8_t* wrong = std::find_if(from, from + n * k, [](uint8_t code) { return code > kLargest<Codes>; });
  TORCH_CHECK(wrong == from + n * k, Codes::kPack, ": codes must be in 0..", kLargest<Codes>, ", got ",
              static_cast<int>(*wrong), " at [", (wrong - from) / k, ", ", (wrong - from) % k, "]");
  const at::Tensor packed =
      at::zeros({ceil_div(n, kAtomRows), ceil_div(k, kAtomColumns), atom_bytes(Codes::kBits)}, codes.options());
  uint8_t* to = packed.mutable_data_ptr<uint8_t>();
  for_each_block(n, k, [&](int64_t block) {
    for_each_code<Codes>(n, k, block, [&](int64_t row, int64_t column, int64_t byte, int shift) {
      to[byte] = static_cast<uint8_t>(to[byte] | (from[row * k + column] << shift));
    });
  });
  return packed;
}

template <class Codes>
at::Tensor unpack_cpu(const at::Tensor& packed, int64_t n, int64_t k) {
  check_packed<Codes>(Codes::kUnpack, packed, n, k);
  const at::Tensor source = packed.contiguous();
  const uint8_t* from = source.const_data_ptr<uint8_t>();
  const at::Tensor codes = at::empty({n, k}, packed.options());
  uint8_t* to = codes.mutable_data_ptr<uint8_t>();
  for_each_block(n, k, [&](int64_t block) {
    for_each_code<Codes>(n, k, block, [&](int64_t row, int64_t column, int64_t byte, int shift) {
      to[row * k + column] = (from[byte] >> shift) & kLargest<Codes>;
    });
  });
  return codes;
}

template <class Codes>
at::Tensor dequantize_cpu(const at::Tensor& packed, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                          int64_t k, int64_t group_size) {
  const int64_t width = check_dequantize<Codes>(packed, scales, zeros, k, group_size);
  const int64_t n = scales.size(1);
  const at::Tensor source = packed.contiguous(), scale_table = scales.contiguous();
  const at::Tensor zero_table = zeros ? zeros->contiguous() : at::Tensor();
  const uint8_t* from = source.const_data_ptr<uint8_t>();
  const at::Half* scale = scale_table.const_data_ptr<at::Half>();
  const uint8_t* zero = zeros ? zero_table.const_data_ptr<uint8_t>() : nullptr;
  const at::Tensor weight = at::empty({n, k}, packed.options().dtype(at::kFloat));
  float* to = weight.mutable_data_ptr<float>();
  for_each_block(n, k, [&](int64_t block) {
    for_each_code<Codes>(n, k, block, [&](int64_t row, int64_t column, int64_t byte, int shift) {
      const int64_t at = column / width * n + row;
      const int code = (from[byte] >> shift) & kLargest<Codes>;
      to[row * k + column] =
          static_cast<float>(code - (zero ? zero[at] : middle_code(Codes::kBits))) * static_cast<float>(scale[at]);
    });
  });
  return weight;
}

template <class Codes>
at::Tensor pack_on_device(const at::Tensor& codes) {
  check_codes<Codes>(codes);
  return pack_any(Codes::kBits, codes);
}

template <class Codes>
at::Tensor unpack_on_device(const at::Tensor& packed, int64_t n, int64_t k) {
  check_packed<Codes>(Codes::kUnpack, packed, n, k);
  return unpack_any(Codes::kBits, packed, n, k);
}

template <class Codes>
at::Tensor dequantize_on_device(const at::Tensor& packed, const at::Tensor& scales,
                                const std::optional<at::Tensor>& zeros, int64_t k, int64_t group_size) {
  const int64_t width = check_dequantize<Codes>(packed, scales, zeros, k, group_size);
  return dequantize_any(Codes::kBits, packed, scales, zeros, k, width);
}

template <class Codes>
at::Tensor pack_meta(const at::Tensor& codes) {
  check_codes<Codes>(codes);
  return at::empty_symint({ceil_div(codes.sym_size(0), kAtomRows), ceil_div(codes.sym_size(1), kAtomColumns),
                           c10::SymInt(atom_bytes(Codes::kBits))},
                          codes.options());
}

template <class Codes>
at::Tensor unpack_meta(const at::Tensor& packed, int64_t n, int64_t k) {
  check_packed<Codes>(Codes::kUnpack, packed, n, k);
  return at::empty({n, k}, packed.options());
}

template <class Codes>
at::Tensor dequantize_meta(const at::Tensor& packed, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                           int64_t k, int64_t group_size) {
  check_dequantize<Codes>(packed, scales, zeros, k, group_size);
  return at::empty_symint({scales.sym_size(1), c10::SymInt(k)}, packed.options().dtype(at::kFloat));
}

}  // namespace

at::Tensor pack_w4(const at::Tensor& codes) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gptq::pack_w4", "").typed<decltype(pack_w4)>();
  return op.call(codes);
}

at::Tensor unpack_w4(const at::Tensor& packed, int64_t n, int64_t k) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gptq::unpack_w4", "").typed<decltype(unpack_w4)>();
  return op.call(packed, n, k);
}

at::Tensor dequantize_w4(const at::Tensor& packed, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                         int64_t k, int64_t group_size) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gptq::dequantize_w4", "").typed<decltype(dequantize_w4)>();
  return op.call(packed, scales, zeros, k, group_size);
}

at::Tensor pack_w8(const at::Tensor& codes) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("gptq::pack_w8", "").typed<decltype(pack_w8)>();
  return op.call(codes);
}

at::Tensor unpack_w8(const at::Tensor& packed, int64_t n, int64_t k) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gptq::unpack_w8", "").typed<decltype(unpack_w8)>();
  return op.call(packed, n, k);
}

at::Tensor dequantize_w8(const at::Tensor& packed, const at::Tensor& scales, const std::optional<at::Tensor>& zeros,
                         int64_t k, int64_t group_size) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("gptq::dequantize_w8", "").typed<decltype(dequantize_w8)>();
  return op.call(packed, scales, zeros, k, group_size);
}

TORCH_LIBRARY_IMPL(gptq, CPU, m) {
  m.impl("pack_w4", pack_cpu<Nibbles>);
  m.impl("unpack_w4", unpack_cpu<Nibbles>);
  m.impl("dequantize_w4", dequantize_cpu<Nibbles>);
  m.impl("pack_w8", pack_cpu<Bytes>);
  m.impl("unpack_w8", unpack_cpu<Bytes>);
  m.impl("dequantize_w8", dequantize_cpu<Bytes>);
}

TORCH_LIBRARY_IMPL(gptq, CUDA, m) {
  m.impl("pack_w4", pack_on_device<Nibbles>);
  m.impl("unpack_w4", unpack_on_device<Nibbles>);
  m.impl("dequantize_w4", dequantize_on_device<Nibbles>);
  m.impl("pack_w8", pack_on_device<Bytes>);
  m.impl("unpack_w8", unpack_on_device<Bytes>);
  m.impl("dequantize_w8", dequantize_on_device<Bytes>);
}

TORCH_LIBRARY_IMPL(gptq, Meta, m) {
  m.impl("pack_w4", pack_meta<Nibbles>);
  m.impl("unpack_w4", unpack_meta<Nibbles>);
  m.impl("dequantize_w4", dequantize_meta<Nibbles>);
  m.impl("pack_w8", pack_meta<Bytes>);
  m.impl("unpack_w8", unpack_meta<Bytes>);
  m.impl("dequantize_w8", dequantize_meta<Bytes>);
}

}  // namespace gptq
