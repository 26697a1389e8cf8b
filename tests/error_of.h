#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <string>

// That the statement throws a c10::Error whose message holds `part`.
#define EXPECT_ERROR(statement, part) \
  EXPECT_PRED_FORMAT2(::gptq::test::error_holds, std::string(part), ::gptq::test::error_of([&] { statement; }))

namespace gptq::test {

inline constexpr const char* kNoError = "no error";

/// What a call throws, or kNoError.
template <typename Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return kNoError;
}

/// That there is an error, and it holds `part`.
inline ::testing::AssertionResult error_holds(const char* part_text, const char* error_text, const std::string& part,
                                              const std::string& error) {
  return error == kNoError ? ::testing::AssertionFailure() << "no error, one with \"" << part << "\" was expected"
                           : ::testing::IsSubstring(part_text, error_text, part, error);
}

}  // namespace gptq::test
