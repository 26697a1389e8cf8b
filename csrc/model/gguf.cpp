#include "model/gguf.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <type_traits>

#include "model/atomic_output.h"

namespace gptq {

namespace {

static_assert(std::endian::native == std::endian::little, "the GGUF files written here are little-endian");

constexpr uint32_t kVersion = 3;
constexpr uint64_t kAlignment = 32;  // the default; any other needs a key of its own
// What ggml takes.
constexpr size_t kMaxNameBytes = 63;
constexpr size_t kMaxDimensions = 4;

enum class ValueType : uint32_t { kUint32 = 4, kInt32 = 5, kFloat32 = 6, kBool = 7, kString = 8, kArray = 9 };

// Elements that are stored together, and their bytes.
struct Block {
  int64_t elements;
  uint64_t bytes;
};

Block block_of(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return {1, 4};
    case GgufType::kF16:
    case GgufType::kBF16:
      return {1, 2};
    case GgufType::kQ4_0:
      return {kGgufBlockSize, 18};
    case GgufType::kQ4_1:
      return {kGgufBlockSize, 20};
    case GgufType::kQ8_0:
      return {kGgufBlockSize, 34};
  }
  TORCH_CHECK(false, "GGUF type must be a known one, got ", static_cast<uint32_t>(type));
}

uint64_t aligned(uint64_t size) {
  return (size + kAlignment - 1) / kAlignment * kAlignment;
}

template <typename T>
void append(std::string& out, T value) {
  static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void append(std::string& out, const std::string& text) {
  append(out, static_cast<uint64_t>(text.size()));
  out += text;
}

template <typename T>
ValueType value_type() {
  if constexpr (std::is_same_v<T, bool>) return ValueType::kBool;
  if constexpr (std::is_same_v<T, uint32_t>) return ValueType::kUint32;
  if constexpr (std::is_same_v<T, int32_t>) return ValueType::kInt32;
  if constexpr (std::is_same_v<T, float>) return ValueType::kFloat32;
  if constexpr (std::is_same_v<T, std::string>) return ValueType::kString;
}

template <typename T>
void append_value(std::string& out, const T& value) {
  append(out, value_type<T>());
  append(out, value);
}

template <typename T>
void append_value(std::string& out, const std::vector<T>& values) {
  append(out, ValueType::kArray);
  append(out, value_type<T>());
  append(out, static_cast<uint64_t>(values.size()));
  for (const T& value : values) append(out, value);
}

}  // namespace

const char* gguf_type_name(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return "F32";
    case GgufType::kF16:
      return "F16";
    case GgufType::kBF16:
      return "BF16";
    case GgufType::kQ4_0:
      return "Q4_0";
    case GgufType::kQ4_1:
      return "Q4_1";
    case GgufType::kQ8_0:
      return "Q8_0";
  }
  return "unknown";
}

void GgufWriter::add(const std::string& key, Value value) {
  const bool is_new =
      std::none_of(values_.begin(), values_.end(), [&](const auto& entry) { return entry.first == key; });
  TORCH_CHECK(is_new, "GgufWriter: key ", key, " must be new, is there already");
  values_.emplace_back(key, std::move(value));
}

void GgufWriter::add_tensor(const std::string& name, GgufType type, std::vector<int64_t> shape, Producer producer) {
  TORCH_CHECK(!name.empty() && name.size() <= kMaxNameBytes, "GgufWriter: a tensor's name must have 1 to ",
              kMaxNameBytes, " bytes, got ", name);
  const bool is_new = std::none_of(tensors_.begin(), tensors_.end(), [&](const auto& one) { return one.name == name; });
  TORCH_CHECK(is_new, "GgufWriter: tensor ", name, " must be new, is there already");
  const bool is_shape = !shape.empty() && shape.size() <= kMaxDimensions &&
                        std::all_of(shape.begin(), shape.end(), [](int64_t size) { return size > 0; });
  TORCH_CHECK(is_shape, "GgufWriter: tensor ", name, " must have 1 to ", kMaxDimensions, " positive dimensions, got ",
              c10::IntArrayRef(shape));
  const Block block = block_of(type);
  TORCH_CHECK(shape.back() % block.elements == 0, "GgufWriter: tensor ", name, ": rows of ", gguf_type_name(type),
              " must be multiples of ", block.elements, " long, got ", shape.back());
  uint64_t bytes = static_cast<uint64_t>(shape.back() / block.elements) * block.bytes;
  for (size_t i = 0; i + 1 < shape.size(); ++i) {
    const bool overflows = __builtin_mul_overflow(bytes, static_cast<uint64_t>(shape[i]), &bytes);
    TORCH_CHECK(!overflows, "GgufWriter: tensor ", name, " must have fewer than 2^64 bytes, has shape ",
                c10::IntArrayRef(shape));
  }
  tensors_.push_back({name, type, std::move(shape), bytes, std::move(producer)});
}

std::string GgufWriter::header() const {
  std::string out = "GGUF";
  append(out, kVersion);
  append(out, static_cast<uint64_t>(tensors_.size()));
  append(out, static_cast<uint64_t>(values_.size()));
  for (const auto& [key, value] : values_) {
    append(out, key);
    std::visit([&out](const auto& held) { append_value(out, held); }, value);
  }
  uint64_t offset = 0;
  for (const Tensor& tensor : tensors_) {
    append(out, tensor.name);
    append(out, static_cast<uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) {
      append(out, static_cast<uint64_t>(*size));
    }
    append(out, tensor.type);
    append(out, offset);
    offset += aligned(tensor.bytes);
  }
  out.resize(aligned(out.size()), '\0');
  return out;
}

void GgufWriter::write(const std::string& path) const {
  AtomicFile file(path);
  const std::string head = header();
  file.write(head.data(), head.size());
  for (const Tensor& tensor : tensors_) {
    uint64_t written = 0;
    tensor.producer([&](const void* data, uint64_t size) {
      file.write(data, size);
      written += size;
    });
    TORCH_CHECK(written == tensor.bytes, path, ": tensor ", tensor.name, " must be given ", tensor.bytes,
                " bytes, got ", written);
    const std::string padding(aligned(written) - written, '\0');
    file.write(padding.data(), padding.size());
  }
  file.commit();
}

}  // namespace gptq
