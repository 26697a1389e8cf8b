#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace gptq {

/// The bytes of a regular file, mapped privately: writes go to this process's own copy of a page.
/// A file that another process shortens while it is mapped ends in SIGBUS, as with every mapping.
class MappedFile {
 public:
  /// @throws c10::Error "<path>: reason" when the file is missing, unreadable or not a regular file
  static std::shared_ptr<const MappedFile> open(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  MappedFile(std::byte* data, uint64_t size) : data_(data), size_(size) {}

  std::byte* data_;
  uint64_t size_;
};

/// The whole content of a regular file of at most max_bytes.
/// @throws c10::Error "<path>: reason"
std::string read_file(const std::string& path, uint64_t max_bytes = uint64_t{1} << 30);

}  // namespace gptq
