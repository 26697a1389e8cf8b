#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

namespace gptq {

/// The first line of what an error of torch, or of the standard library, says.
inline std::string error_line(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string text = of_torch != nullptr ? of_torch->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

}  // namespace gptq
