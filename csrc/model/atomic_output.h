#pragma once

#include <cstdint>
#include <string>

namespace gptq {

/// A file that appears under its name complete or not at all: it is written to a temporary sibling, which commit()
/// renames and the destructor otherwise removes. A device or pipe (/dev/stdout) is written to as it is.
class AtomicFile {
 public:
  /// @throws c10::Error "<path>: reason" when the sibling cannot be created
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// @throws c10::Error "<path>: reason", a full disk for one
  void write(const void* data, uint64_t size);
  /// Closes the file and gives it its name, in place of a file of that name.
  void commit();

 private:
  std::string path_;
  std::string temporary_;
  int descriptor_ = -1;
};

/// A folder that appears under its name complete or not at all, see AtomicFile.
///
/// An existing folder is replaced if it is empty or looks like a model folder (has config.json), so that a command can
/// be run again; anything else is left alone with an error.
class AtomicFolder {
 public:
  /// @throws c10::Error "<path>: reason" when the path may not be replaced or the sibling cannot be created
  explicit AtomicFolder(const std::string& path);
  ~AtomicFolder();
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;

  /// Path of a file of this name in the temporary folder.
  std::string file(const std::string& name) const { return temporary_ + "/" + name; }
  void commit();

 private:
  std::string path_;
  std::string temporary_;
};

/// Throws what AtomicFile would throw, before long work is begun. Leaves nothing behind.
void check_output_file(const std::string& path);

/// Throws what AtomicFolder would throw, before long work is begun. Leaves nothing behind.
void check_output_folder(const std::string& path);

}  // namespace gptq
