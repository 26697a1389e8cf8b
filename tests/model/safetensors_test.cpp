#include "model/safetensors.h"

#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

using test::TempFolder;

std::string file_bytes(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + header + data;
}

// Opening a file with this header and 8 bytes of data must fail with `part` in the message.
void expect_refused(const std::string& header, const std::string& part) {
  const TempFolder folder;
  folder.write("x.safetensors", file_bytes(header, "01234567"));
  EXPECT_ERROR(SafetensorsFile::open(folder.path("x.safetensors")), part) << "\nheader: " << header;
}

// Reads everything in the file, if it opens. Returns whether it did.
bool opens(const std::string& path) {
  try {
    const auto file = SafetensorsFile::open(path);
    for (const auto& name : file.names()) file.tensor(name).to(at::kDouble).sum().item<double>();
    return true;
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(path), std::string::npos);
    return false;
  }
}

TEST(Safetensors, RoundTripOfEveryDtype) {
  const TempFolder folder;
  const std::string path = folder.path("x.safetensors");
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto dtype : {at::kByte, at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                           at::kShort, at::kChar, at::kBool}) {
    tensors.emplace_back(c10::toString(dtype), at::randint(0, 2, {3, 1, 5}).to(dtype));
  }
  tensors.emplace_back("scalar", at::tensor(2.5f).squeeze());
  tensors.emplace_back("empty", at::empty({4, 0, 7}));
  tensors.emplace_back("transposed", at::rand({7, 3}).t());
  save_safetensors(path, tensors, {{"format", "pt"}});
  const auto file = SafetensorsFile::open(path);
  EXPECT_EQ(file.names().size(), tensors.size());
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(file.tensor(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(file.tensor(name), tensor)) << name;
  }
  EXPECT_ERROR(file.tensor("other"), "has no tensor \"other\"");
}

TEST(Safetensors, TensorsOutliveTheFileObjectAndNeverChangeTheFile) {
  const TempFolder folder;
  const std::string path = folder.path("x.safetensors");
  save_safetensors(path, {{"a", at::arange(6, at::kFloat)}});
  at::Tensor tensor = SafetensorsFile::open(path).tensor("a");
  tensor.mul_(2);
  EXPECT_TRUE(at::equal(tensor, at::arange(6, at::kFloat) * 2));
  EXPECT_TRUE(at::equal(SafetensorsFile::open(path).tensor("a"), at::arange(6, at::kFloat)));
}

TEST(Safetensors, MisalignedDataIsCopied) {
  const TempFolder folder;
  const float value = 1.5f;
  const std::string header = R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}})";
  std::string data = "x";
  data.append(reinterpret_cast<const char*>(&value), sizeof(value));
  folder.write("x.safetensors", file_bytes(header, data));
  const at::Tensor tensor = SafetensorsFile::open(folder.path("x.safetensors")).tensor("b");
  EXPECT_EQ(tensor.item<float>(), value);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignof(float), 0u);
}

TEST(Safetensors, LyingHeadersAreRefused) {
  const auto tensor = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  expect_refused(tensor("F32", "[3]", "[0,12]"), "within the 8 bytes of data");
  expect_refused(tensor("F32", "[2]", "[8,0]"), "must be ordered");
  expect_refused(tensor("F32", "[2]", "[-8,0]"), "non-negative integers");
  expect_refused(tensor("F32", "[2]", "[0,8.0]"), "non-negative integers");
  expect_refused(tensor("F32", "[2]", "[0,18446744073709551615]"), "within");
  expect_refused(tensor("F32", "[2]", "[0,28446744073709551616]"), "non-negative integers");
  expect_refused(tensor("F32", "[2]", "[0,1e999]"), "out of range");
  expect_refused(tensor("F32", "[2]", "[0]"), "two");
  expect_refused(tensor("F32", "[3]", "[0,8]"), "need 12 bytes, data_offsets hold 8");
  expect_refused(tensor("F32", "[-2]", "[0,8]"), "shape");
  expect_refused(tensor("F32", "[\"2\"]", "[0,8]"), "shape");
  expect_refused(tensor("F32", "[4294967296,4294967296]", "[0,8]"), "shape");
  expect_refused(tensor("F32", "[9223372036854775807,0,3]", "[0,8]"), "shape");
  expect_refused(tensor("F32", "2", "[0,8]"), "shape");
  expect_refused(tensor("F8_E4M3", "[8]", "[0,8]"), "dtype must be one of");
  expect_refused(tensor("U8", "[4]", "[0,4]"), "4 bytes belong to no tensor");
  expect_refused(tensor("U8", "[4]", "[4,8]"), "leaves a hole");
  expect_refused(tensor("U8", "[2]", "[0,2]").substr(0, 20), "not valid JSON");
  expect_refused(R"({"a":1})", "must have exactly dtype, shape and data_offsets");
  expect_refused(R"({"a":{"dtype":"U8","shape":[8]}})", "must have exactly");
  expect_refused("[]", "must be a JSON object");
  expect_refused("", "must be a JSON object");
  expect_refused(R"({"__metadata__":{"a":1}})", "must be a string");
  expect_refused(R"({"__metadata__":[]})", "must be an object");
  expect_refused("{\"\xff\":1}", "not valid JSON");
  expect_refused("{\"a\":" + std::string(100000, '['), "nested");
  const std::string half = R"({"dtype":"U8","shape":[8],"data_offsets":[0,8]})";
  expect_refused("{\"a\":" + half + ",\"b\":" + half + "}", "overlaps the tensor before it");
  expect_refused("{\"a\":" + half + ",\"a\":" + half + "}", "no duplicate key");
}

TEST(Safetensors, HeaderLengthsThatLieAreRefused) {
  const TempFolder folder;
  const std::string path = folder.path("x.safetensors");
  for (const uint64_t length : {uint64_t{3}, uint64_t{100'000'001}, UINT64_MAX, UINT64_MAX - 7}) {
    folder.write("x.safetensors", std::string(reinterpret_cast<const char*>(&length), 8) + "{}");
    EXPECT_ERROR(SafetensorsFile::open(path), "offset 0");
  }
  folder.write("x.safetensors", "");
  EXPECT_ERROR(SafetensorsFile::open(path), "the file has 0 bytes");
  EXPECT_ERROR(SafetensorsFile::open(folder.path("none")), "cannot be opened");
  EXPECT_ERROR(SafetensorsFile::open(folder.path()), "must be a regular file");
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const TempFolder folder;
  save_safetensors(folder.path("x.safetensors"), {{"a", at::rand({3})}, {"b", at::ones({5}, at::kByte)}});
  const std::string bytes = folder.read("x.safetensors");
  for (size_t size = 0; size < bytes.size(); ++size) {
    folder.write("cut.safetensors", bytes.substr(0, size));
    EXPECT_FALSE(opens(folder.path("cut.safetensors"))) << "first " << size << " bytes";
  }
  EXPECT_TRUE(opens(folder.path("x.safetensors")));
}

// Every single bit of length and header flipped: an error or a file within bounds, never a crash.
TEST(Safetensors, NoFlippedBitOfTheHeaderCrashes) {
  const TempFolder folder;
  save_safetensors(folder.path("x.safetensors"), {{"a", at::rand({3})}, {"b", at::ones({5}, at::kByte)}});
  const std::string bytes = folder.read("x.safetensors");
  int64_t refused = 0;
  for (size_t bit = 0; bit < 8 * (bytes.size() - 17); ++bit) {
    std::string changed = bytes;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << (bit % 8)));
    folder.write("bit.safetensors", changed);
    refused += opens(folder.path("bit.safetensors")) ? 0 : 1;
  }
  EXPECT_GT(refused, 64);  // each bit of the length alone changes where the header ends
}

TEST(Safetensors, WriterRefusesWhatCannotBeWritten) {
  const TempFolder folder;
  const std::string path = folder.path("x.safetensors");
  EXPECT_ERROR(save_safetensors(path, {{"a", at::ones({2}, at::kComplexFloat)}}), "dtype");
  EXPECT_ERROR(save_safetensors(path, {{"a", at::ones({2})}, {"a", at::ones({2})}}), "must be new");
  EXPECT_ERROR(save_safetensors(folder.path("no/x.safetensors"), {}), "cannot be written");
  EXPECT_ERROR(save_safetensors("/dev/full", {{"a", at::ones({2})}}), "No space left");
  EXPECT_EQ(folder.count(), 0);
}

TEST(TensorStore, ReadsTheOneFileThatAutoGptqNamesAfterItsSettings) {
  const TempFolder folder;
  save_safetensors(folder.path("gptq_model-4bit-128g.safetensors"), {{"a", at::ones({2})}});
  EXPECT_TRUE(TensorStore::open(folder.path()).contains("a"));
  save_safetensors(folder.path("gptq_model-3bit--1g.safetensors"), {{"a", at::ones({2})}});
  EXPECT_ERROR(TensorStore::open(folder.path()), "must hold model.safetensors");
}

TEST(TensorStore, ReadsOneFileOrShards) {
  const TempFolder folder;
  EXPECT_ERROR(TensorStore::open(folder.path()), "must hold model.safetensors");
  save_safetensors(folder.path("one.safetensors"), {{"a", at::ones({2})}});
  save_safetensors(folder.path("two.safetensors"), {{"b", at::zeros({3})}});
  folder.write("model.safetensors.index.json",
               R"({"metadata":{},"weight_map":{"b":"two.safetensors","a":"one.safetensors"}})");
  const auto store = TensorStore::open(folder.path());
  EXPECT_EQ(store.names(), (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(at::equal(store.tensor("b"), at::zeros({3})));
  EXPECT_ERROR(store.tensor("c"), "has no tensor");
}

TEST(TensorStore, RefusesBadIndexes) {
  const TempFolder folder;
  save_safetensors(folder.path("one.safetensors"), {{"a", at::ones({2})}});
  const auto refuse = [&](const std::string& index, const std::string& part) {
    folder.write("model.safetensors.index.json", index);
    EXPECT_ERROR(TensorStore::open(folder.path()), part);
  };
  refuse("{", "not valid JSON");
  refuse("{}", "weight_map must be an object");
  refuse(R"({"weight_map":{"a":"../one.safetensors"}})", "in the same folder");
  refuse(R"({"weight_map":{"a":"/etc/x.safetensors"}})", "in the same folder");
  refuse(R"({"weight_map":{"a":"one.bin"}})", "in the same folder");
  refuse(R"({"weight_map":{"a":7}})", "in the same folder");
  refuse(R"({"weight_map":{"b":"one.safetensors"}})", "does not hold it");
  refuse(R"({"weight_map":{"a":"two.safetensors"}})", "cannot be opened");
}

}  // namespace
}  // namespace gptq
