#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <string>

// That the statement throws a c10::Error whose message holds `part`.
#define EXPECT_ERROR(statement, part) \
  EXPECT_PRED_FORMAT2(::testing::IsSubstring, std::string(part), ::gptq::test::error_of([&] { statement; }))

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
