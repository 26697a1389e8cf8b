// EXPECT_ERROR(expression, text): the expression throws a c10::Error whose message contains the text.
#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <string>

#define EXPECT_ERROR(expression, text)                                                   \
  try {                                                                                  \
    (void)(expression);                                                                  \
    ADD_FAILURE() << #expression << " did not throw";                                    \
  } catch (const c10::Error& error) {                                                    \
    EXPECT_NE(std::string(error.what_without_backtrace()).find(text), std::string::npos) \
        << "expected: " << text << "\nthrown: " << error.what_without_backtrace();       \
  }
