#pragma once

#include <string>

#include "model/regex.h"

namespace gptq {

/// A regular expression that a linear's path has to match from its start, not necessarily to its end, as Python's
/// re.match has it.
class PathPattern {
 public:
  /// @param where names the expression in errors
  /// @throws c10::Error "<where> must be a regular expression, is none: <reason>"
  PathPattern(const std::string& expression, std::string where);

  /// @throws c10::Error where matching takes too long
  bool matches(const std::string& path) const;

 private:
  std::string where_;
  Regex regex_;
};

/// A regular expression for this path and no other.
std::string exactly(const std::string& path);

}  // namespace gptq
