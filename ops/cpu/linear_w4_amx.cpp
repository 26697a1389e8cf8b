#include "cpu/linear_w4_amx.h"

namespace gptq {
namespace {

// The instructions as they are: the compilers' own macros cannot take a template parameter as the name of a tile.
struct HardwareTiles {
  static void begin() { __asm__ volatile("ldtilecfg %0" ::"m"(kTileConfig)); }
  static void end() { __asm__ volatile("tilerelease" ::: "memory"); }

  template <int C>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(C));
  }
  template <int T>
  static void load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int C>
  static void store(void* to) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(kLineBytes), "i"(C) : "memory");
  }
  template <int C, int A, int B, bool kSigned>
  static void multiply() {
    if constexpr (kSigned) {
      __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    } else {
      __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
  }
};

}  // namespace

const LinearW4Kernel kLinearW4Amx = {split_entry<AmxVectors>, multiply_amx<HardwareTiles>};

}  // namespace gptq
