#include "model/quantized_linear.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>

#include "model/json_file.h"
#include "rewrite/packed_weight.h"

namespace gptq {

namespace {

constexpr std::array kGptqLeaves = {".qweight", ".qzeros", ".g_idx"};

bool has_gptq_tensors(const GPT2Tensors& tensors, const std::string& path) {
  return std::any_of(kGptqLeaves.begin(), kGptqLeaves.end(),
                     [&](const char* leaf) { return tensors.contains(path + leaf); });
}

const QuantizationConfig& checked_settings(const std::optional<QuantizationConfig>& settings, const std::string& path,
                                           bool is_gptq) {
  const char* leaf = is_gptq ? ".qweight" : ".packed";
  TORCH_CHECK(settings, "config.json: quantization_config must be there, since ", show(path + leaf),
              " is in the checkpoint");
  TORCH_CHECK((settings->format == CheckpointFormat::kGptq) == is_gptq,
              "config.json: quantization_config: quant_method must be ", is_gptq ? "\"gptq\"" : "\"libgptq\"",
              ", since ", show(path + leaf), " is in the checkpoint, is the other");
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
    TORCH_CHECK(size * bits % 32 == 0, tensors.path(), ": tensor ", show(path + leaf), " must be of a linear whose ",
                what, " fill whole words of 32 bits, got ", size, " of ", bits, " bits");
    return size * bits / 32;
  };
  const int64_t groups = group_count(shape.k, group_size);
  GptqTensors stored;
  stored.qweight = tensors.typed(path + ".qweight", at::kInt, {words(".qweight", "inputs", shape.k), shape.n});
  stored.qzeros = tensors.typed(path + ".qzeros", at::kInt, {groups, words(".qzeros", "outputs", shape.n)});
  stored.scales = tensors.raw(path + ".scales", {groups, shape.n});
  if (tensors.contains(path + ".g_idx")) stored.g_idx = tensors.typed(path + ".g_idx", at::kInt, {shape.k});
  return unpack_gptq(stored, {bits, group_size, settings.gptq_zeros, settings.symmetric}, tensors.path() + ": " + path);
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
  return tensors.contains(path + ".packed") || has_gptq_tensors(tensors, path);
}

QuantizedTensors read_quantized_linear(GPT2Tensors& tensors, const std::optional<QuantizationConfig>& settings,
                                       const std::string& path, LinearShape shape) {
  if (has_gptq_tensors(tensors, path)) {
    const CodedWeight weight = read_gptq(tensors, checked_settings(settings, path, true), path, shape);
    return at_linear(tensors, path, [&] { return pack_weight(weight); });
  }
  return read_packed(tensors, checked_settings(settings, path, false), path, shape);
}

CodedWeight read_coded_linear(GPT2Tensors& tensors, const std::optional<QuantizationConfig>& settings,
                              const std::string& path, LinearShape shape) {
  if (has_gptq_tensors(tensors, path)) {
    return read_gptq(tensors, checked_settings(settings, path, true), path, shape);
  }
  const QuantizedTensors packed = read_packed(tensors, checked_settings(settings, path, false), path, shape);
  return at_linear(tensors, path, [&] { return unpack_weight(packed, shape.n, shape.k); });
}

}  // namespace gptq
