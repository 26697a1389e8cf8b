#include "model/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <torch/script.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace gptq {

std::shared_ptr<const MappedFile> MappedFile::open(const std::string& path) {
  // Without O_NONBLOCK opening a pipe would wait for a writer.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  TORCH_CHECK(descriptor >= 0, path, ": cannot be opened: ", std::strerror(errno));
  struct stat status{};
  const bool regular = fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  const auto size = static_cast<uint64_t>(status.st_size);
  void* data = nullptr;
  if (regular && size > 0) {
    data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, descriptor, 0);
  }
  const int error = errno;
  close(descriptor);
  TORCH_CHECK(regular, path, ": must be a regular file");
  TORCH_CHECK(data != MAP_FAILED, path, ": cannot be mapped: ", std::strerror(error));
  return std::shared_ptr<const MappedFile>(new MappedFile(static_cast<std::byte*>(data), size));
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

std::string read_file(const std::string& path, uint64_t max_bytes) {
  const auto file = MappedFile::open(path);
  TORCH_CHECK(file->size() <= max_bytes, path, ": must have at most ", max_bytes, " bytes, has ", file->size());
  return {reinterpret_cast<const char*>(file->data()), static_cast<size_t>(file->size())};
}

}  // namespace gptq
