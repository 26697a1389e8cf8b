#pragma once

#include "linear_w4.h"

namespace gptq {

extern const LinearW4Kernel kLinearW4AmxInSoftware;

}  // namespace gptq
