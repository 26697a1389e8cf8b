#include "model/atomic_output.h"

#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

using test::TempFolder;
namespace fs = std::filesystem;

TEST(AtomicFile, AppearsOnCommitOnly) {
  const TempFolder folder;
  {
    AtomicFile file(folder.path("a"));
    file.write("12", 2);
    EXPECT_FALSE(fs::exists(folder.path("a")));
  }
  EXPECT_EQ(folder.count(), 0);
  folder.write("a", "old");
  AtomicFile file(folder.path("a"));
  file.write("12", 2);
  EXPECT_EQ(folder.read("a"), "old");
  file.commit();
  EXPECT_EQ(folder.read("a"), "12");
  EXPECT_EQ(folder.count(), 1);
}

TEST(AtomicFile, Errors) {
  const TempFolder folder;
  EXPECT_ERROR(AtomicFile(folder.path()), "is a folder");
  EXPECT_ERROR(AtomicFile(folder.path("no/a")), "cannot be written: No such file");
  EXPECT_ERROR(AtomicFile(""), "must not be empty");
  AtomicFile full("/dev/full");
  EXPECT_ERROR(full.write("12", 2), "/dev/full: cannot be written: No space left");
  EXPECT_TRUE(fs::is_character_file("/dev/full"));
}

TEST(AtomicFolder, AppearsOnCommitOnly) {
  const TempFolder folder;
  {
    const AtomicFolder output(folder.path("out"));
    AtomicFile file(output.file("a"));
    file.commit();
    EXPECT_FALSE(fs::exists(folder.path("out")));
  }
  EXPECT_EQ(folder.count(), 0);
  AtomicFolder output(folder.path("out/"));
  AtomicFile(output.file("a")).commit();
  output.commit();
  EXPECT_TRUE(fs::exists(folder.path("out/a")));
  EXPECT_EQ(folder.count(), 1);
}

TEST(AtomicFolder, ReplacesEmptyAndModelFoldersOnly) {
  const TempFolder folder;
  fs::create_directory(folder.path("out"));
  AtomicFolder first(folder.path("out"));
  AtomicFile(first.file("config.json")).commit();
  first.commit();
  AtomicFolder second(folder.path("out"));
  AtomicFile(second.file("b")).commit();
  second.commit();
  EXPECT_FALSE(fs::exists(folder.path("out/config.json")));
  EXPECT_TRUE(fs::exists(folder.path("out/b")));
  EXPECT_EQ(folder.count(), 1);
  EXPECT_ERROR(AtomicFolder(folder.path("out")), "it holds other files");
  EXPECT_ERROR(check_output_folder(folder.path("out")), "it holds other files");
  folder.write("file", "");
  EXPECT_ERROR(AtomicFolder(folder.path("file")), "is a file");
  EXPECT_ERROR(AtomicFolder(folder.path("no/out")), "cannot be written");
  check_output_folder(folder.path("new"));
  EXPECT_EQ(folder.count(), 2);
}

}  // namespace
}  // namespace gptq
