#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "model/mapped_file.h"

namespace gptq {

/// One safetensors file, mapped into memory. Nothing in the file is trusted: everything that the header says is checked
/// when the file is opened.
///
/// The format: https://huggingface.co/docs/safetensors. The dtypes F64, F32, F16, BF16, I64, I32, I16, I8, U8 and BOOL
/// are read.
class SafetensorsFile {
 public:
  /// @throws c10::Error "<path>: offset N: reason"; N is where in the file the fault lies
  static SafetensorsFile open(const std::string& path);

  /// Sorted.
  const std::vector<std::string>& names() const { return names_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  bool contains(const std::string& name) const { return entries_.count(name) > 0; }
  /// A view of the mapped bytes, which stay mapped as long as the tensor lives; a copy where they are not aligned for
  /// the dtype. Writing to the tensor does not change the file.
  at::Tensor tensor(const std::string& name) const;
  const std::string& path() const { return path_; }

 private:
  struct Entry {
    at::ScalarType dtype;
    std::vector<int64_t> shape;
    uint64_t begin;  // in the file
    uint64_t bytes;
  };

  void parse_header();
  void add_entry(const std::string& name, const nlohmann::json& value, uint64_t data_begin);
  void check_layout(uint64_t data_begin) const;

  std::string path_;
  std::shared_ptr<const MappedFile> file_;
  std::vector<std::string> names_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// The tensors of a model folder: model.safetensors, or the shards that model.safetensors.index.json lists, or the one
/// gptq_model-*.safetensors of AutoGPTQ.
class TensorStore {
 public:
  /// @throws c10::Error "<file>: reason"
  static TensorStore open(const std::string& folder);

  /// Sorted.
  std::vector<std::string> names() const;
  bool contains(const std::string& name) const { return file_of_.count(name) > 0; }
  at::Tensor tensor(const std::string& name) const;
  /// Path of the file that holds the tensor, for messages.
  const std::string& path(const std::string& name) const;
  /// model.safetensors or the index.
  const std::string& path() const { return path_; }

 private:
  const SafetensorsFile& file(const std::string& name) const;
  void open_shards(const std::string& folder);

  std::string path_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, size_t> file_of_;
};

/// Writes a safetensors file: first to a temporary sibling, so that no half-written file is left.
///
/// @param tensors on the CPU, of a dtype that SafetensorsFile reads; wide dtypes are put first, otherwise the order
///        is kept, and so every tensor is aligned
/// @throws c10::Error "<path>: reason", a full disk for one
void save_safetensors(const std::string& path, const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace gptq
