#include "model/quantization_config.h"

#include <algorithm>

#include "model/json_fields.h"

namespace gptq {

namespace {

void read_group_size(const JsonFields& fields, int64_t& target) {
  const Json* value = fields.find("group_size");
  if (value != nullptr && *value == -1) {
    target = -1;
  } else {
    fields.size("group_size", target);
  }
}

void read_bits(const JsonFields& fields, int64_t& target) {
  const Json* value = fields.find("bits");
  if (value == nullptr) return;
  if (*value < 2 || *value > 8 || !value->is_number_integer()) fields.fail("bits", "an integer from 2 to 8", *value);
  target = value->get<int64_t>();
}

void read_gptq_bits(const JsonFields& fields, int64_t& target) {
  const Json* value = fields.find("bits");
  if (value == nullptr) return;
  const bool known = value->is_number_integer() && (*value == 2 || *value == 3 || *value == 4 || *value == 8);
  if (!known) fields.fail("bits", "2, 3, 4 or 8", *value);
  target = value->get<int64_t>();
}

void read_compute(const JsonFields& fields, std::string& target) {
  fields.text("compute", target);
  if (target != "exact" && target != "bf16" && target != "int8")
    fields.fail("compute", "\"exact\", \"bf16\" or \"int8\"", target);
}

void require(const JsonFields& fields, const char* name, const Json& wanted) {
  const Json* value = fields.find(name);
  if (value == nullptr || *value != wanted) fields.fail(name, show(wanted), value == nullptr ? Json() : *value);
}

QuantizationConfig read_libgptq(const JsonFields& fields) {
  require(fields, "format", "w4");
  require(fields, "version", 1);
  QuantizationConfig result;
  read_bits(fields, result.defaults.bits);
  read_group_size(fields, result.defaults.group_size);
  fields.flag("sym", result.symmetric);
  read_compute(fields, result.compute);
  const Json* modules = fields.find("modules");
  if (modules == nullptr) return result;
  if (!modules->is_object()) fields.fail("modules", "an object", *modules);
  for (const auto& [path, value] : modules->items()) {
    const std::string where = fields.source() + ": modules: " + show(path);
    TORCH_CHECK(value.is_object(), where, " must be an object, got ", show(value));
    const JsonFields module_fields(value, where);
    auto& module = result.modules.emplace(path, result.defaults).first->second;
    read_bits(module_fields, module.bits);
    read_group_size(module_fields, module.group_size);
  }
  return result;
}

// gptqmodel takes one off whole words when it writes version 1, and adds it to whole words when it reads.
bool is_by_gptqmodel(const JsonFields& fields) {
  const Json* meta = fields.find("meta");
  if (meta == nullptr || !meta->is_object() || !meta->contains("quantizer")) return false;
  const Json& quantizer = (*meta)["quantizer"];
  const auto is_it = [](const Json& name) {
    return name.is_string() && name.get<std::string>().starts_with("gptqmodel:");
  };
  return is_it(quantizer) || (quantizer.is_array() && std::any_of(quantizer.begin(), quantizer.end(), is_it));
}

GptqZeros read_zeros_form(const JsonFields& fields) {
  const char* name = fields.find("checkpoint_format") != nullptr ? "checkpoint_format" : "format";
  std::string format = "gptq";
  fields.text(name, format);
  if (format != "gptq" && format != "gptq_v2") fields.fail(name, "\"gptq\" or \"gptq_v2\"", format);
  if (format == "gptq_v2") return GptqZeros::kPlain;
  return is_by_gptqmodel(fields) ? GptqZeros::kLessOneByWord : GptqZeros::kLessOne;
}

// Null if the pattern only says that what it matches is not quantized, which the tensors tell.
std::optional<QuantizationConfig::Pattern> read_pattern(const std::string& key, const Json& value,
                                                        const std::string& where, bool& symmetric) {
  if (key.starts_with("-:")) return std::nullopt;
  TORCH_CHECK(value.is_object(), where, " must be an object, got ", show(value));
  QuantizationConfig::Pattern pattern{key, PathPattern(key.starts_with("+:") ? key.substr(2) : key, where), {}, {}};
  const JsonFields fields(value, where);
  int64_t bits = 0, group_size = 0;
  read_gptq_bits(fields, bits);
  read_group_size(fields, group_size);
  if (bits != 0) pattern.bits = bits;
  if (group_size != 0) pattern.group_size = group_size;
  bool pattern_symmetric = symmetric;
  fields.flag("sym", pattern_symmetric);
  symmetric = symmetric && pattern_symmetric;
  return pattern;
}

QuantizationConfig read_gptq(const JsonFields& fields) {
  QuantizationConfig result;
  result.format = CheckpointFormat::kGptq;
  result.gptq_zeros = read_zeros_form(fields);
  std::string pack_dtype = "int32";
  fields.text("pack_dtype", pack_dtype);
  if (pack_dtype != "int32") fields.fail("pack_dtype", "\"int32\"", pack_dtype);
  bool is_marlin = false;
  fields.flag("is_marlin_format", is_marlin);
  if (is_marlin) fields.fail("is_marlin_format", "false", true);
  // Each changes what the tensors mean.
  for (const char* name : {"adapter", "rotation", "activation"}) {
    if (const Json* value = fields.find(name)) fields.fail(name, "null", *value);
  }
  if (fields.find("bits") == nullptr) fields.fail("bits", "2, 3, 4 or 8", nullptr);
  read_gptq_bits(fields, result.defaults.bits);
  read_group_size(fields, result.defaults.group_size);
  fields.flag("sym", result.symmetric);
  const Json* dynamic = fields.find("dynamic");
  if (dynamic == nullptr) return result;
  if (!dynamic->is_object()) fields.fail("dynamic", "an object", *dynamic);
  for (const auto& [key, value] : dynamic->items()) {
    auto pattern = read_pattern(key, value, fields.source() + ": dynamic: " + show(key), result.symmetric);
    if (pattern) result.patterns.push_back(std::move(*pattern));
  }
  return result;
}

QuantizationConfig read_compressed_tensors(const JsonFields& fields) {
  QuantizationConfig result;
  result.format = CheckpointFormat::kCompressedTensors;
  result.compressed_tensors = CompressedTensorsConfig::parse(fields);
  return result;
}

}  // namespace

const char* format_name(CheckpointFormat format) {
  switch (format) {
    case CheckpointFormat::kLibgptq:
      return "libgptq";
    case CheckpointFormat::kGptq:
      return "gptq";
    case CheckpointFormat::kCompressedTensors:
      return "compressed-tensors";
  }
  TORCH_CHECK(false, "not a checkpoint format: ", static_cast<int>(format));
}

std::optional<CheckpointFormat> format_named(const std::string& name) {
  for (const auto format :
       {CheckpointFormat::kLibgptq, CheckpointFormat::kGptq, CheckpointFormat::kCompressedTensors}) {
    if (name == format_name(format)) return format;
  }
  return std::nullopt;
}

QuantizationConfig::Module QuantizationConfig::of(const std::string& path) const {
  const auto found = modules.find(path);
  if (found != modules.end()) return found->second;
  Module result = defaults;
  const Pattern* first = nullptr;
  for (const Pattern& pattern : patterns) {
    if (!pattern.pattern.matches(path)) continue;
    const Module module{pattern.bits.value_or(defaults.bits), pattern.group_size.value_or(defaults.group_size)};
    TORCH_CHECK(first == nullptr || (module.bits == result.bits && module.group_size == result.group_size),
                "quantization_config: dynamic: ", show(path), " must match one pattern, matches ", show(first->text),
                " and ", show(pattern.text), ", which differ");
    first = &pattern;
    result = module;
  }
  return result;
}

QuantizationConfig QuantizationConfig::parse(const Json& json, const std::string& source, const char* default_method) {
  TORCH_CHECK(json.is_object(), source, " must be an object, got ", show(json));
  const JsonFields fields(json, source);
  const Json* method = fields.find("quant_method");
  const Json name = method != nullptr ? *method : default_method != nullptr ? Json(default_method) : Json();
  const auto format = name.is_string() ? format_named(name.get<std::string>()) : std::nullopt;
  if (!format) fields.fail("quant_method", "\"libgptq\", \"gptq\" or \"compressed-tensors\"", name);
  switch (*format) {
    case CheckpointFormat::kLibgptq:
      return read_libgptq(fields);
    case CheckpointFormat::kGptq:
      return read_gptq(fields);
    case CheckpointFormat::kCompressedTensors:
      return read_compressed_tensors(fields);
  }
  TORCH_CHECK(false, "not a checkpoint format");
}

}  // namespace gptq
