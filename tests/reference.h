#pragma once

// Slow, obvious float64 references. They share no code with the library.

#include "tests/reference_gptq.h"
#include "tests/reference_refine.h"
#if __has_include("tests/reference_w4.h")
#include "tests/reference_w4.h"
#endif
