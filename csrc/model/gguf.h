#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace gptq {

/// How the elements of a tensor are held, by GGUF's numbers. The last three hold blocks of 32 elements of a row:
/// Q4_0 is a scale d and 4-bit codes q for d (q - 8), Q4_1 has a minimum m too for d q + m, and Q8_0 is a scale and
/// signed bytes q for d q; d and m are f16.
enum class GgufType : uint32_t { kF32 = 0, kF16 = 1, kBF16 = 30, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8 };

inline constexpr int64_t kGgufBlockSize = 32;

const char* gguf_type_name(GgufType type);

/// Writes a GGUF file, version 3: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensors are asked for
/// their bytes when their turn comes, so that one at a time is in memory.
class GgufWriter {
 public:
  using Value = std::variant<bool, uint32_t, float, std::string, std::vector<int32_t>, std::vector<std::string>>;
  /// Takes bytes of a tensor, in order.
  using Sink = std::function<void(const void* data, uint64_t size)>;
  using Producer = std::function<void(const Sink& sink)>;

  /// @throws c10::Error for a key that is there already
  void add(const std::string& key, Value value);

  /// @param shape outermost dimension first, as in torch; with blocks the last one must be a multiple of 32
  /// @param producer gives the sink the row-major elements or blocks
  /// @throws c10::Error for a name that is there already, or a shape that does not fit the type
  void add_tensor(const std::string& name, GgufType type, std::vector<int64_t> shape, Producer producer);

  /// The file appears under its name complete or not at all.
  /// @throws c10::Error "<path>: reason"; and what a producer throws
  void write(const std::string& path) const;

 private:
  struct Tensor {
    std::string name;
    GgufType type;
    std::vector<int64_t> shape;
    uint64_t bytes;
    Producer producer;
  };

  std::string header() const;

  std::vector<std::pair<std::string, Value>> values_;
  std::vector<Tensor> tensors_;
};

}  // namespace gptq
