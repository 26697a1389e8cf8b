#include "model/safetensors.h"

#include <torch/script.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <filesystem>
#include <optional>

#include "model/atomic_output.h"
#include "model/json_file.h"

namespace gptq {

namespace fs = std::filesystem;

namespace {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
// Tensor objects hold arrays, and nothing is nested deeper.
constexpr int kHeaderDepth = 3;
// ATen's reductions take no more dimensions.
constexpr size_t kMaxDimensions = 64;
constexpr uint64_t kAlignment = 64;

struct DtypeName {
  const char* name;
  at::ScalarType dtype;
};
constexpr std::array<DtypeName, 10> kDtypes{{{"F64", at::kDouble},
                                             {"F32", at::kFloat},
                                             {"F16", at::kHalf},
                                             {"BF16", at::kBFloat16},
                                             {"I64", at::kLong},
                                             {"I32", at::kInt},
                                             {"I16", at::kShort},
                                             {"I8", at::kChar},
                                             {"U8", at::kByte},
                                             {"BOOL", at::kBool}}};

std::optional<at::ScalarType> parse_dtype(const Json& name) {
  for (const auto& entry : kDtypes) {
    if (name == entry.name) return entry.dtype;
  }
  return std::nullopt;
}

const char* dtype_name(at::ScalarType dtype) {
  for (const auto& entry : kDtypes) {
    if (entry.dtype == dtype) return entry.name;
  }
  return nullptr;
}

// Size in bytes; nothing if the shape is not one, or if it or its strides overflow.
std::optional<uint64_t> parse_shape(const Json& dimensions, uint64_t item_bytes, std::vector<int64_t>& shape) {
  if (!dimensions.is_array() || dimensions.size() > kMaxDimensions) return std::nullopt;
  int64_t capacity = static_cast<int64_t>(item_bytes);
  bool empty = false;
  for (const Json& dimension : dimensions) {
    if (!dimension.is_number_unsigned()) return std::nullopt;
    const auto size = dimension.get<uint64_t>();
    if (size > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
    shape.push_back(static_cast<int64_t>(size));
    empty = empty || size == 0;
    if (size > 0 && __builtin_mul_overflow(capacity, shape.back(), &capacity)) return std::nullopt;
  }
  return empty ? 0 : static_cast<uint64_t>(capacity);
}

// The one file of a folder: model.safetensors or, if it is not there, what AutoGPTQ names after bits and group size,
// gptq_model-4bit-128g.safetensors for one.
std::string single_file(const std::string& folder) {
  const fs::path usual = fs::path(folder) / "model.safetensors";
  std::error_code ignored;
  std::vector<std::string> others;
  if (!fs::exists(usual, ignored)) {
    for (const auto& entry : fs::directory_iterator(folder, ignored)) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with("gptq_model-") && name.ends_with(".safetensors")) others.push_back(entry.path().string());
    }
  }
  return others.size() == 1 ? others[0] : usual.string();
}

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  SafetensorsFile result;
  result.path_ = path;
  result.file_ = MappedFile::open(path);
  result.parse_header();
  return result;
}

void SafetensorsFile::parse_header() {
  const uint64_t size = file_->size();
  TORCH_CHECK(size >= kLengthBytes, path_, ": offset 0: must start with an 8-byte header length, the file has ", size,
              " bytes");
  uint64_t length = 0;
  std::memcpy(&length, file_->data(), kLengthBytes);
  TORCH_CHECK(length <= kMaxHeaderBytes, path_, ": offset 0: header must have at most ", kMaxHeaderBytes,
              " bytes, claims ", length);
  TORCH_CHECK(length <= size - kLengthBytes, path_, ": offset 0: header claims ", length, " bytes, the file has ",
              size - kLengthBytes, " after the length");
  const std::string_view text(reinterpret_cast<const char*>(file_->data()) + kLengthBytes, length);
  TORCH_CHECK(text.starts_with('{'), path_, ": offset 8: header must be a JSON object, must start with {");
  const Json header = parse_json_object(text, path_, kLengthBytes, kHeaderDepth);
  const uint64_t data_begin = kLengthBytes + length;
  for (const auto& [name, value] : header.items()) {
    if (name != "__metadata__") {
      add_entry(name, value, data_begin);
      continue;
    }
    TORCH_CHECK(value.is_object(), path_, ": offset 8: __metadata__ must be an object, got ", show(value));
    for (const auto& [key, text_value] : value.items()) {
      TORCH_CHECK(text_value.is_string(), path_, ": offset 8: __metadata__ ", show(key), " must be a string, got ",
                  show(text_value));
      metadata_[key] = text_value.get<std::string>();
    }
  }
  check_layout(data_begin);
}

void SafetensorsFile::add_entry(const std::string& name, const Json& value, uint64_t data_begin) {
  const std::string where = path_ + ": offset 8: tensor " + show(name) + ": ";
  TORCH_CHECK(value.is_object() && value.size() == 3 && value.contains("dtype") && value.contains("shape") &&
                  value.contains("data_offsets"),
              where, "must have exactly dtype, shape and data_offsets, got ", show(value));
  const auto dtype = parse_dtype(value["dtype"]);
  TORCH_CHECK(dtype, where, "dtype must be one of F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL, got ",
              show(value["dtype"]));
  Entry entry{*dtype, {}, 0, 0};
  const auto bytes = parse_shape(value["shape"], c10::elementSize(*dtype), entry.shape);
  TORCH_CHECK(bytes, where, "shape must be at most 64 non-negative integers whose product fits in 63 bits, got ",
              show(value["shape"]));
  const Json& offsets = value["data_offsets"];
  TORCH_CHECK(
      offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() && offsets[1].is_number_unsigned(),
      where, "data_offsets must be two non-negative integers, got ", show(offsets));
  const auto begin = offsets[0].get<uint64_t>();
  const auto end = offsets[1].get<uint64_t>();
  const uint64_t data_bytes = file_->size() - data_begin;
  TORCH_CHECK(begin <= end && end <= data_bytes, where, "data_offsets must be ordered and within the ", data_bytes,
              " bytes of data, got ", show(offsets));
  entry.begin = data_begin + begin;
  entry.bytes = end - begin;
  TORCH_CHECK(entry.bytes == *bytes, path_, ": offset ", entry.begin, ": tensor ", show(name), ": dtype ",
              show(value["dtype"]), " and shape ", show(value["shape"]), " need ", *bytes, " bytes, data_offsets hold ",
              entry.bytes);
  names_.push_back(name);
  entries_.emplace(name, std::move(entry));
}

void SafetensorsFile::check_layout(uint64_t data_begin) const {
  std::vector<std::pair<const std::string*, const Entry*>> ordered;
  ordered.reserve(entries_.size());
  for (const auto& [name, entry] : entries_) ordered.emplace_back(&name, &entry);
  std::sort(ordered.begin(), ordered.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin, a.second->bytes) < std::pair(b.second->begin, b.second->bytes);
  });
  uint64_t expected = data_begin;
  for (const auto& [name, entry] : ordered) {
    TORCH_CHECK(entry->begin == expected, path_, ": offset ", entry->begin, ": tensor ", show(*name),
                entry->begin < expected ? ": overlaps the tensor before it, which ends at offset "
                                        : ": leaves a hole after offset ",
                expected);
    expected = entry->begin + entry->bytes;
  }
  TORCH_CHECK(expected == file_->size(), path_, ": offset ", expected, ": ", file_->size() - expected,
              " bytes belong to no tensor");
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const {
  const auto found = entries_.find(name);
  TORCH_CHECK(found != entries_.end(), path_, ": has no tensor ", show(name));
  const Entry& entry = found->second;
  std::byte* data = file_->data() + entry.begin;
  const uint64_t alignment = c10::elementSize(entry.dtype);
  if (entry.dtype == at::kBool) {  // a byte other than 0 and 1 is no bool
    return at::from_blob(data, entry.shape, at::kByte).ne(0);
  }
  if (entry.bytes == 0) return at::empty(entry.shape, entry.dtype);
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) {
    at::Tensor copy = at::empty(entry.shape, entry.dtype);
    std::memcpy(copy.data_ptr(), data, entry.bytes);
    return copy;
  }
  return at::from_blob(data, entry.shape, [file = file_](void*) {}, at::TensorOptions().dtype(entry.dtype));
}

TensorStore TensorStore::open(const std::string& folder) {
  TensorStore result;
  const std::string index = (fs::path(folder) / "model.safetensors.index.json").string();
  std::error_code ignored;
  if (!fs::exists(fs::path(folder) / "model.safetensors", ignored) && fs::exists(index, ignored)) {
    result.path_ = index;
    result.open_shards(folder);
    return result;
  }
  const std::string single = single_file(folder);
  TORCH_CHECK(fs::exists(single, ignored), folder, ": must hold model.safetensors or model.safetensors.index.json",
              fs::exists(fs::path(folder) / "pytorch_model.bin", ignored)
                  ? "; pytorch_model.bin is not read, save the model with safetensors"
                  : "");
  result.path_ = single;
  result.files_.push_back(SafetensorsFile::open(single));
  for (const auto& name : result.files_[0].names()) result.file_of_[name] = 0;
  return result;
}

void TensorStore::open_shards(const std::string& folder) {
  const Json index = read_json_object(path_);
  TORCH_CHECK(index.contains("weight_map") && index["weight_map"].is_object(), path_,
              ": weight_map must be an object, got ",
              index.contains("weight_map") ? show(index["weight_map"]) : "none");
  std::map<std::string, size_t> shards;
  for (const auto& [name, value] : index["weight_map"].items()) {
    const std::string shard = value.is_string() ? value.get<std::string>() : "";
    TORCH_CHECK(shard.ends_with(".safetensors") && shard.find_first_of(std::string_view("/\\\0", 3)) == shard.npos,
                path_, ": weight_map ", show(name), " must be the name of a .safetensors file in the same folder, got ",
                show(value));
    const auto [found, is_new] = shards.emplace(shard, files_.size());
    if (is_new) files_.push_back(SafetensorsFile::open((std::filesystem::path(folder) / shard).string()));
    TORCH_CHECK(files_[found->second].contains(name), path_, ": weight_map puts ", show(name), " in ", show(shard),
                ", which does not hold it");
    file_of_[name] = found->second;
  }
}

std::vector<std::string> TensorStore::names() const {
  std::vector<std::string> result;
  result.reserve(file_of_.size());
  for (const auto& [name, file] : file_of_) result.push_back(name);
  return result;
}

const SafetensorsFile& TensorStore::file(const std::string& name) const {
  const auto found = file_of_.find(name);
  TORCH_CHECK(found != file_of_.end(), path_, ": has no tensor ", show(name));
  return files_[found->second];
}

at::Tensor TensorStore::tensor(const std::string& name) const {
  return file(name).tensor(name);
}

const std::string& TensorStore::path(const std::string& name) const {
  return file(name).path();
}

void save_safetensors(const std::string& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                      const std::map<std::string, std::string>& metadata) {
  auto ordered = tensors;
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const auto& a, const auto& b) { return a.second.element_size() > b.second.element_size(); });
  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t end = 0;
  for (const auto& [name, tensor] : ordered) {
    const char* dtype = dtype_name(tensor.scalar_type());
    TORCH_CHECK(dtype != nullptr && tensor.device().is_cpu(), path, ": tensor ", show(name),
                " must be on the CPU and of a dtype that safetensors knows, got ", tensor.toString());
    TORCH_CHECK(!header.contains(name) && name != "__metadata__", path, ": tensor name ", show(name),
                " must be new and not __metadata__");
    const uint64_t begin = end;
    end += tensor.nbytes();
    header[name] = {{"dtype", dtype}, {"shape", tensor.sizes().vec()}, {"data_offsets", {begin, end}}};
  }
  std::string text = header.dump();
  text.append((kAlignment - (kLengthBytes + text.size()) % kAlignment) % kAlignment, ' ');
  AtomicFile file(path);
  const uint64_t length = text.size();
  file.write(&length, kLengthBytes);
  file.write(text.data(), length);
  for (const auto& [name, tensor] : ordered) {
    const at::Tensor contiguous = tensor.contiguous();
    file.write(contiguous.const_data_ptr(), contiguous.nbytes());
  }
  file.commit();
}

}  // namespace gptq
