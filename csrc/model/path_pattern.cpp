#include "model/path_pattern.h"

#include <c10/util/Exception.h>

#include <stdexcept>
#include <utility>

namespace gptq {

namespace {

Regex compiled(const std::string& expression, const std::string& where) {
  try {
    return Regex("\\A(?:" + expression + ")");
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, where, " must be a regular expression, is none: ", error.what());
  }
}

}  // namespace

PathPattern::PathPattern(const std::string& expression, std::string where)
    : where_(std::move(where)), regex_(compiled(expression, where_)) {}

bool PathPattern::matches(const std::string& path) const {
  try {
    return Regex::Search(regex_, path).from(0).has_value();
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, where_, " must not repeat without end: ", error.what());
  }
}

std::string exactly(const std::string& path) {
  std::string result = "^";
  for (const char c : path) {
    if (c == '.') result += '\\';
    result += c;
  }
  return result + "$";
}

}  // namespace gptq
