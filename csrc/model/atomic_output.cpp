#include "model/atomic_output.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <torch/script.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <utility>

namespace gptq {

namespace fs = std::filesystem;

namespace {

// Linux writes at most 2 GiB a call.
constexpr uint64_t kWriteBytes = uint64_t{1} << 30;

// A hidden name beside the target, on the same file system so that rename works.
std::string sibling_of(const std::string& path, const char* purpose) {
  static std::atomic<int> counter{0};
  const fs::path target(path);
  const std::string name = c10::str(".", target.filename().string(), ".", purpose, "-", getpid(), "-", counter++);
  return (target.parent_path() / name).string();
}

// Absolute, links followed, no slash at the end.
std::string normalised(const std::string& path) {
  TORCH_CHECK(!path.empty(), "output path must not be empty");
  std::error_code error;
  fs::path result = fs::weakly_canonical(path, error);
  TORCH_CHECK(!error, path, ": cannot be resolved: ", error.message());
  if (result.filename().empty()) result = result.parent_path();
  TORCH_CHECK(result.has_filename(), path, ": must name a file or folder");
  return result.string();
}

void check_replaceable(const std::string& path) {
  std::error_code error;
  const auto status = fs::status(path, error);
  if (!fs::exists(status)) return;
  TORCH_CHECK(fs::is_directory(status), path, ": output must be a folder, is a file");
  const bool empty = fs::is_empty(path, error);
  TORCH_CHECK(!error, path, ": cannot be read: ", error.message());
  TORCH_CHECK(empty || fs::exists(fs::path(path) / "config.json", error), path,
              ": output folder must be new, empty or an earlier model folder (with config.json); it holds other files");
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path) {
  std::error_code ignored;
  const auto status = fs::status(path, ignored);
  TORCH_CHECK(!fs::is_directory(status), path, ": output must be a file, is a folder");
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    path_ = path;
    descriptor_ = ::open(path.c_str(), O_WRONLY | O_CLOEXEC);
  } else {
    path_ = normalised(path);
    temporary_ = sibling_of(path_, "tmp");
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  }
  TORCH_CHECK(descriptor_ >= 0, path, ": cannot be written: ", std::strerror(errno));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) close(descriptor_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, uint64_t size) {
  const char* next = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t written = ::write(descriptor_, next, std::min(size, kWriteBytes));
    if (written < 0 && errno == EINTR) continue;
    TORCH_CHECK(written > 0, path_, ": cannot be written: ", std::strerror(written < 0 ? errno : ENOSPC));
    next += written;
    size -= static_cast<uint64_t>(written);
  }
}

void AtomicFile::commit() {
  const int closed = close(std::exchange(descriptor_, -1));
  TORCH_CHECK(closed == 0, path_, ": cannot be written: ", std::strerror(errno));
  if (temporary_.empty()) return;
  TORCH_CHECK(std::rename(temporary_.c_str(), path_.c_str()) == 0, path_,
              ": cannot be written: ", std::strerror(errno));
  temporary_.clear();
}

AtomicFolder::AtomicFolder(const std::string& path) : path_(normalised(path)) {
  check_replaceable(path_);
  const std::string temporary = sibling_of(path_, "tmp");
  TORCH_CHECK(mkdir(temporary.c_str(), 0777) == 0, path, ": cannot be written: ", std::strerror(errno));
  temporary_ = temporary;
}

AtomicFolder::~AtomicFolder() {
  std::error_code ignored;
  if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
}

void AtomicFolder::commit() {
  check_replaceable(path_);
  std::string replaced;
  std::error_code ignored;
  if (fs::exists(path_, ignored)) {
    replaced = sibling_of(path_, "old");
    TORCH_CHECK(std::rename(path_.c_str(), replaced.c_str()) == 0, path_,
                ": cannot be replaced: ", std::strerror(errno));
  }
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    const bool restored = replaced.empty() || std::rename(replaced.c_str(), path_.c_str()) == 0;
    TORCH_CHECK(false, path_, ": cannot be written: ", std::strerror(error),
                restored ? "" : "; what it held is in " + replaced);
  }
  temporary_.clear();
  if (!replaced.empty()) fs::remove_all(replaced, ignored);
}

void check_output_file(const std::string& path) {
  AtomicFile probe(path);
}

void check_output_folder(const std::string& path) {
  AtomicFolder probe(path);
}

}  // namespace gptq
