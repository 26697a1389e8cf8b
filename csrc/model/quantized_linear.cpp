#include "model/quantized_linear.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>

#include "model/json_file.h"
#include "model/packed_words.h"
#include "rewrite/packed_weight.h"

namespace gptq {

namespace {

constexpr std::array kGptqLeaves = {".qweight", ".qzeros", ".g_idx"};
constexpr std::array kCompressedTensorsLeaves = {".weight_packed", ".weight_scale", ".weight_zero_point",
                                                 ".weight_shape", ".weight_g_idx"};

// The format of the tensors that are there for the linear, whatever config.json says; nothing if it is not quantized.
std::optional<CheckpointFormat> stored_format(const GPT2Tensors& tensors, const std::string& path) {
  const auto is_there = [&](const char* leaf) { return tensors.contains(path + leaf); };
  if (std::any_of(kGptqLeaves.begin(), kGptqLeaves.end(), is_there)) return CheckpointFormat::kGptq;
  if (std::any_of(kCompressedTensorsLeaves.begin(), kCompressedTensorsLeaves.end(), is_there)) {
    return CheckpointFormat::kCompressedTensors;
  }
  if (is_there(".packed")) return CheckpointFormat::kLibgptq;
  return std::nullopt;
}

// A tensor that every linear of the format has.
const char* main_leaf(CheckpointFormat format) {
  switch (format) {
    case CheckpointFormat::kLibgptq:
      return ".packed";
    case CheckpointFormat::kGptq:
      return kGptqLeaves[0];
    case CheckpointFormat::kCompressedTensors:
      return kCompressedTensorsLeaves[0];
  }
  TORCH_CHECK(false, "not a checkpoint format");
}

const QuantizationConfig& checked_settings(const std::optional<QuantizationConfig>& settings, const std::string& path,
                                           CheckpointFormat format) {
  const char* leaf = main_leaf(format);
  TORCH_CHECK(settings, "config.json: quantization_config must be there, since ", show(path + leaf),
              " is in the checkpoint");
  TORCH_CHECK(settings->format == format, "config.json: quantization_config: quant_method must be ",
              show(format_name(format)), ", since ", show(path + leaf), " is in the checkpoint, is ",
              show(format_name(settings->format)));
  return *settings;
}

QuantizedTensors read_packed(GPT2Tensors& tensors, const QuantizationConfig& settings, const std::string& path,
                             LinearShape shape) {
  const auto [bits, group_size] = settings.of(path);
  const int64_t groups = group_count(shape.k, group_size);
  QuantizedTensors result;
  result.bits = bits;
  result.group_size = group_size;
  result.packed = tensors.typed(path + ".packed", at::kByte,
                                {(shape.n + 15) / 16, (shape.k + 7) / 8, 16 * rewrite::packed_bits(bits)});
  result.scales = tensors.typed(path + ".scales", at::kHalf, {groups, shape.n});
  if (tensors.contains(path + ".zeros")) {
    result.zeros = tensors.typed(path + ".zeros", at::kByte, {groups, shape.n});
  }
  if (tensors.contains(path + ".input_order")) {
    result.input_order = tensors.typed(path + ".input_order", at::kInt, {shape.k});
  }
  return result;
}

CodedWeight read_gptq(GPT2Tensors& tensors, const QuantizationConfig& settings, const std::string& path,
                      LinearShape shape) {
  const auto [bits, group_size] = settings.of(path);
  const auto words = [&](const char* leaf, const char* what, int64_t size) {
    TORCH_CHECK(size * bits % kWordBits == 0, tensors.path(), ": tensor ", show(path + leaf),
                " must be of a linear whose ", what, " fill whole words of 32 bits, got ", size, " of ", bits, " bits");
    return size * bits / kWordBits;
  };
  const int64_t groups = group_count(shape.k, group_size);
  GptqTensors stored;
  stored.qweight = tensors.typed(path + ".qweight", at::kInt, {words(".qweight", "inputs", shape.k), shape.n});
  stored.qzeros = tensors.typed(path + ".qzeros", at::kInt, {groups, words(".qzeros", "outputs", shape.n)});
  stored.scales = tensors.raw(path + ".scales", {groups, shape.n});
  if (tensors.contains(path + ".g_idx")) stored.g_idx = tensors.typed(path + ".g_idx", at::kInt, {shape.k});
  return unpack_gptq(stored, {bits, group_size, settings.gptq_zeros, settings.symmetric}, tensors.path() + ": " + path);
}

CodedWeight read_compressed_tensors(GPT2Tensors& tensors, const QuantizationConfig& settings, const std::string& path,
                                    LinearShape shape) {
  const CompressedTensorsLayout layout = settings.compressed_tensors.of(path);
  const std::string name = tensors.path() + ": " + path;
  check_compressed_tensors_fits(name, layout.bits, layout.group_size, shape.k);
  const int64_t groups = group_count(shape.k, layout.group_size);
  CompressedTensors stored;
  stored.packed = tensors.typed(path + ".weight_packed", at::kInt, {shape.n, word_count(shape.k, layout.bits)});
  stored.scale = tensors.raw(path + ".weight_scale", {shape.n, groups});
  stored.shape = tensors.raw(path + ".weight_shape", {2});
  if (!layout.symmetric) {
    stored.zero_point =
        tensors.typed(path + ".weight_zero_point", at::kInt, {word_count(shape.n, layout.bits), groups});
  }
  if (tensors.contains(path + ".weight_g_idx")) {
    stored.g_idx = tensors.typed(path + ".weight_g_idx", at::kInt, {shape.k});
  }
  return unpack_compressed_tensors(stored, layout, shape.n, shape.k, name);
}

// Runs the step; its errors name the file and the linear.
template <typename Step>
auto at_linear(const GPT2Tensors& tensors, const std::string& path, const Step& step) {
  try {
    return step();
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, tensors.path(), ": ", path, ": ", error.what_without_backtrace());
  }
}

}  // namespace

bool is_quantized_linear(const GPT2Tensors& tensors, const std::string& path) {
  return stored_format(tensors, path).has_value();
}

CodedWeight read_coded_linear(GPT2Tensors& tensors, const std::optional<QuantizationConfig>& settings,
                              const std::string& path, LinearShape shape) {
  const CheckpointFormat format = stored_format(tensors, path).value_or(CheckpointFormat::kLibgptq);
  const QuantizationConfig& checked = checked_settings(settings, path, format);
  switch (format) {
    case CheckpointFormat::kLibgptq: {
      const QuantizedTensors packed = read_packed(tensors, checked, path, shape);
      return at_linear(tensors, path, [&] { return unpack_weight(packed, shape.n, shape.k); });
    }
    case CheckpointFormat::kGptq:
      return read_gptq(tensors, checked, path, shape);
    case CheckpointFormat::kCompressedTensors:
      return read_compressed_tensors(tensors, checked, path, shape);
  }
  TORCH_CHECK(false, "not a checkpoint format");
}

QuantizedTensors read_quantized_linear(GPT2Tensors& tensors, const std::optional<QuantizationConfig>& settings,
                                       const std::string& path, LinearShape shape) {
  if (stored_format(tensors, path) == CheckpointFormat::kLibgptq) {
    return read_packed(tensors, checked_settings(settings, path, CheckpointFormat::kLibgptq), path, shape);
  }
  const CodedWeight weight = read_coded_linear(tensors, settings, path, shape);
  return at_linear(tensors, path, [&] { return pack_weight(weight); });
}

std::map<std::string, CodedWeight> read_coded_linears(const TensorStore& store, const GPT2Config& config) {
  GPT2Tensors tensors(store);
  std::map<std::string, CodedWeight> linears;
  for (const auto& [path, shape] : config.linear_shapes()) {
    if (is_quantized_linear(tensors, path)) {
      linears[path] = read_coded_linear(tensors, config.quantization, path, shape);
    }
  }
  return linears;
}

}  // namespace gptq
