#include "model/gguf.h"

#include <cstring>
#include <numeric>
#include <stdexcept>

#include "tests/model/tiny_gpt2.h"

namespace gptq {
namespace {

using test::TempFolder;

// Reads little-endian values one after the other, byte by byte.
class Bytes {
 public:
  explicit Bytes(std::string content) : content_(std::move(content)) {}

  uint64_t number(int size) {
    uint64_t value = 0;
    for (int i = 0; i < size; ++i) {
      value |= uint64_t{static_cast<unsigned char>(content_.at(at_++))} << (8 * i);
    }
    return value;
  }
  std::string text() {
    const uint64_t size = number(8);
    at_ += size;
    return content_.substr(at_ - size, size);
  }
  void align(uint64_t alignment) {
    while (at_ % alignment != 0) EXPECT_EQ(content_.at(at_++), '\0') << "padding at " << at_;
  }
  uint64_t at() const { return at_; }
  const std::string& content() const { return content_; }

 private:
  std::string content_;
  uint64_t at_ = 0;
};

struct Tensor {
  std::vector<uint64_t> dimensions;
  uint64_t type;
  uint64_t offset;
};

struct File {
  std::map<std::string, Json> values;  // with the number of the type in front
  std::vector<std::string> names;
  std::map<std::string, Tensor> tensors;
  uint64_t data_begin;
  std::string content;

  std::string data(const std::string& name, uint64_t size) const {
    return content.substr(data_begin + tensors.at(name).offset, size);
  }
};

Json read_value(Bytes& bytes, uint64_t type) {
  if (type == 4) return bytes.number(4);
  if (type == 5) return static_cast<int32_t>(bytes.number(4));
  if (type == 6) {
    const auto bits = static_cast<uint32_t>(bytes.number(4));
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  if (type == 7) return bytes.number(1) == 1;
  if (type == 8) return bytes.text();
  throw std::runtime_error("type " + std::to_string(type) + " is not read here");
}

File read_file(const std::string& content) {
  Bytes bytes(content);
  File file;
  file.content = content;
  EXPECT_EQ(bytes.number(4), 0x46554747);  // GGUF
  EXPECT_EQ(bytes.number(4), 3);
  const uint64_t tensors = bytes.number(8);
  const uint64_t values = bytes.number(8);
  for (uint64_t i = 0; i < values; ++i) {
    const std::string key = bytes.text();
    const uint64_t type = bytes.number(4);
    Json entry = {type};
    if (type == 9) {
      const uint64_t element = bytes.number(4);
      entry.push_back(element);
      const uint64_t count = bytes.number(8);
      for (uint64_t j = 0; j < count; ++j) entry.push_back(read_value(bytes, element));
    } else {
      entry.push_back(read_value(bytes, type));
    }
    EXPECT_TRUE(file.values.emplace(key, entry).second) << key;
  }
  for (uint64_t i = 0; i < tensors; ++i) {
    file.names.push_back(bytes.text());
    Tensor tensor;
    tensor.dimensions.resize(bytes.number(4));
    for (uint64_t& dimension : tensor.dimensions) dimension = bytes.number(8);
    tensor.type = bytes.number(4);
    tensor.offset = bytes.number(8);
    file.tensors[file.names.back()] = tensor;
  }
  bytes.align(32);
  file.data_begin = bytes.at();
  return file;
}

GgufWriter::Producer producer_of(const std::string& content) {
  return [content](const GgufWriter::Sink& sink) {
    sink(content.data(), content.size() / 3);
    sink(content.data() + content.size() / 3, content.size() - content.size() / 3);
  };
}

TEST(Gguf, HoldsWhatItWasGiven) {
  const TempFolder folder;
  GgufWriter writer;
  writer.add("a.flag", true);
  writer.add("a.count", uint32_t{4'000'000'000});
  writer.add("a.number", 1e-5F);
  writer.add("a.text", "Ġzoë");
  writer.add("a.types", std::vector<int32_t>{1, -3, 6});
  writer.add("a.tokens", std::vector<std::string>{"a", "", "long token"});
  const std::string vector(5 * 4, 'v');
  const std::string halves(3 * 7 * 2, 'h');
  const std::string blocks(2 * 3 * 34, 'b');
  writer.add_tensor("vector", GgufType::kF32, {5}, producer_of(vector));
  writer.add_tensor("halves", GgufType::kBF16, {3, 7}, producer_of(halves));
  writer.add_tensor("blocks", GgufType::kQ8_0, {2, 96}, producer_of(blocks));
  writer.write(folder.path("model.gguf"));

  const File file = read_file(folder.read("model.gguf"));
  EXPECT_EQ(file.values, (std::map<std::string, Json>{{"a.flag", {7, true}},
                                                      {"a.count", {4, 4'000'000'000}},
                                                      {"a.number", {6, 1e-5F}},
                                                      {"a.text", {8, "Ġzoë"}},
                                                      {"a.types", {9, 5, 1, -3, 6}},
                                                      {"a.tokens", {9, 8, "a", "", "long token"}}}));
  EXPECT_EQ(file.names, (std::vector<std::string>{"vector", "halves", "blocks"}));
  EXPECT_EQ(file.tensors.at("vector").dimensions, (std::vector<uint64_t>{5}));
  EXPECT_EQ(file.tensors.at("halves").dimensions, (std::vector<uint64_t>{7, 3}));
  EXPECT_EQ(file.tensors.at("blocks").dimensions, (std::vector<uint64_t>{96, 2}));
  EXPECT_EQ(file.tensors.at("vector").type, 0);
  EXPECT_EQ(file.tensors.at("halves").type, 30);
  EXPECT_EQ(file.tensors.at("blocks").type, 8);
  EXPECT_EQ(file.tensors.at("vector").offset, 0);
  EXPECT_EQ(file.tensors.at("halves").offset, 32);
  EXPECT_EQ(file.tensors.at("blocks").offset, 96);
  EXPECT_EQ(file.data("vector", 32), vector + std::string(12, '\0'));
  EXPECT_EQ(file.data("halves", 64), halves + std::string(22, '\0'));
  EXPECT_EQ(file.data("blocks", 1000), blocks + std::string(20, '\0'));
}

TEST(Gguf, RefusesWhatDoesNotFit) {
  const TempFolder folder;
  GgufWriter writer;
  writer.add("key", true);
  EXPECT_ERROR(writer.add("key", uint32_t{1}), "key key must be new");
  writer.add_tensor("w", GgufType::kF16, {2, 3}, producer_of(std::string(11, 'x')));
  const auto add = [&](const std::string& name, GgufType type, const std::vector<int64_t>& shape) {
    writer.add_tensor(name, type, shape, producer_of(""));
  };
  EXPECT_ERROR(add("w", GgufType::kF32, {1}), "tensor w must be new");
  EXPECT_ERROR(add("", GgufType::kF32, {1}), "must have 1 to 63 bytes");
  EXPECT_ERROR(add(std::string(64, 'n'), GgufType::kF32, {1}), "must have 1 to 63 bytes");
  EXPECT_ERROR(add("v", GgufType::kF32, {}), "must have 1 to 4 positive dimensions");
  EXPECT_ERROR(add("v", GgufType::kF32, {2, 0}), "must have 1 to 4 positive dimensions, got [2, 0]");
  EXPECT_ERROR(add("v", GgufType::kF32, {1, 1, 1, 1, 1}), "must have 1 to 4 positive dimensions");
  EXPECT_ERROR(add("v", GgufType::kQ4_0, {2, 48}), "rows of Q4_0 must be multiples of 32 long, got 48");
  EXPECT_ERROR(add("v", GgufType::kF32, {int64_t{1} << 40, int64_t{1} << 40}), "fewer than 2^64 bytes");
  EXPECT_ERROR(writer.write(folder.path("model.gguf")), "tensor w must be given 12 bytes, got 11");
  EXPECT_EQ(folder.count(), 0);
}

TEST(Gguf, LeavesNoFileWhereAProducerThrows) {
  const TempFolder folder;
  GgufWriter writer;
  writer.add_tensor("w", GgufType::kF32, {2}, [](const GgufWriter::Sink& sink) {
    sink("1234", 4);
    throw std::runtime_error("no more");
  });
  EXPECT_THROW(writer.write(folder.path("model.gguf")), std::runtime_error);
  EXPECT_EQ(folder.count(), 0);
}

}  // namespace
}  // namespace gptq
