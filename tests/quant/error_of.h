#pragma once

#include <c10/util/Exception.h>

#include <string>

namespace gptq::test {

/// What a call throws, or "no error".
template <typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

}  // namespace gptq::test
