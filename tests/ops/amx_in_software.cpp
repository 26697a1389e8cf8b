// The AMX kernel with its tile instructions in software, after Intel's description of them, so that every machine with
// AVX512-VNNI tests all of it but the instructions. Compiled as kernels are.
#include "tests/ops/amx_in_software.h"

#include "cpu/linear_w4_amx.h"

namespace gptq {
namespace {

struct SoftwareTiles {
  struct State {
    bool configured = false;
    uint8_t tiles[8][16][64];
  };

  static State& state() {
    static thread_local State state;
    return state;
  }

  static void check(bool holds) {
    if (!holds) __builtin_trap();
  }

  static void begin() {
    uint8_t bytes[64];
    __builtin_memcpy(bytes, &kTileConfig, sizeof(bytes));
    check(bytes[0] == 1 && bytes[1] == 0);
    for (int i = 2; i < 16; ++i) check(bytes[i] == 0);
    for (int tile = 0; tile < 8; ++tile) {
      check(bytes[16 + 2 * tile] == 64 && bytes[17 + 2 * tile] == 0);
      check(bytes[48 + tile] == 16);
    }
    check(!state().configured);
    state().configured = true;
    __builtin_memset(state().tiles, 0xff, sizeof(state().tiles));
  }

  static void end() {
    check(state().configured);
    state().configured = false;
  }

  template <int C>
  static void zero() {
    check(state().configured);
    __builtin_memset(state().tiles[C], 0, 1024);
  }

  template <int T>
  static void load(const void* from, int64_t stride) {
    check(state().configured);
    for (int row = 0; row < 16; ++row)
      __builtin_memcpy(state().tiles[T][row], static_cast<const char*>(from) + row * stride, 64);
  }

  template <int C>
  static void store(void* to) {
    check(state().configured);
    __builtin_memcpy(to, state().tiles[C], 1024);
  }

  template <int C, int A, int B, bool kSigned>
  static void multiply() {
    static_assert(C != A && C != B && A != B);
    check(state().configured);
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        int32_t sum;
        __builtin_memcpy(&sum, state().tiles[C][m] + 4 * n, sizeof(sum));
        for (int k = 0; k < 64; ++k) {
          const uint8_t byte = state().tiles[B][k / 4][4 * n + k % 4];
          sum += static_cast<int8_t>(state().tiles[A][m][k]) * (kSigned ? static_cast<int8_t>(byte) : byte);
        }
        __builtin_memcpy(state().tiles[C][m] + 4 * n, &sum, sizeof(sum));
      }
  }
};

}  // namespace

const LinearW4Kernel kLinearW4AmxInSoftware = {split_entry<AmxVectors>, multiply_amx<SoftwareTiles>};

}  // namespace gptq
