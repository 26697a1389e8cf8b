#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <string>
#include <utility>

#include "model/json_file.h"

namespace gptq {

/// Reads typed fields of one JSON object. A field that is absent or null leaves the target as it is; errors are
/// "<source>: <field> must be <requirement>, got <value>".
class JsonFields {
 public:
  /// Far beyond any model, and small enough that no product of two sizes overflows.
  static constexpr int64_t kMaxSize = int64_t{1} << 30;

  /// @param json must outlive the object
  JsonFields(const Json& json, std::string source) : json_(json), source_(std::move(source)) {}

  const Json* find(const char* name) const {
    const auto found = json_.find(name);
    return found == json_.end() || found->is_null() ? nullptr : &*found;
  }

  [[noreturn]] void fail(const char* name, const std::string& requirement, const Json& value) const {
    TORCH_CHECK(false, source_, ": ", name, " must be ", requirement, ", got ", show(value));
  }

  void size(const char* name, int64_t& target, int64_t maximum = kMaxSize) const {
    const Json* value = find(name);
    if (value == nullptr) return;
    const bool in_range = value->is_number_unsigned() ? value->get<uint64_t>() <= static_cast<uint64_t>(maximum)
                                                      : value->is_number_integer() && value->get<int64_t>() <= maximum;
    if (!in_range || value->get<int64_t>() < 1) fail(name, "an integer in 1.." + std::to_string(maximum), *value);
    target = value->get<int64_t>();
  }

  void flag(const char* name, bool& target) const {
    const Json* value = find(name);
    if (value == nullptr) return;
    if (!value->is_boolean()) fail(name, "true or false", *value);
    target = value->get<bool>();
  }

  void text(const char* name, std::string& target) const {
    const Json* value = find(name);
    if (value == nullptr) return;
    if (!value->is_string()) fail(name, "a string", *value);
    target = value->get<std::string>();
  }

  const std::string& source() const { return source_; }

 private:
  const Json& json_;
  std::string source_;
};

}  // namespace gptq
