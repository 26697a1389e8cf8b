#pragma once

#include <cstdint>

#define GPTQ_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GPTQ_X86_LEVELS 1
#endif

// For kernel files, each of which holds a kernel's code once, for vectors of any size. g++ cuts vectors that the
// processor does not have into pieces in memory, so that a kernel must not use wider ones than its level has.

namespace gptq {

/// A vector of kBytes.
template <int64_t kBytes, typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <int64_t kBytes, typename T>
using Lanes = typename LanesOf<kBytes, T>::type;

template <typename Kernel, typename... Arguments>
auto run_baseline(Arguments... arguments) {
  return Kernel::template run<16>(arguments...);
}

#ifdef GPTQ_X86_LEVELS
template <typename Kernel, typename... Arguments>
__attribute__((target("avx2,fma"))) auto run_avx2(Arguments... arguments) {
  return Kernel::template run<32>(arguments...);
}

template <typename Kernel, typename... Arguments>
__attribute__((target("avx512f"))) auto run_avx512(Arguments... arguments) {
  return Kernel::template run<64>(arguments...);
}
#endif

/// Kernel::run<bytes>(arguments...), an inline function, compiled for the best instruction set that this processor has,
/// whose vectors are of as many bytes.
template <typename Kernel, typename... Arguments>
auto run_at_best_level(Arguments... arguments) {
  using Run = decltype(&run_baseline<Kernel, Arguments...>);
#ifdef GPTQ_X86_LEVELS
  static const Run chosen = __builtin_cpu_supports("avx512f") ? run_avx512<Kernel, Arguments...>
                            : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                                ? run_avx2<Kernel, Arguments...>
                                : run_baseline<Kernel, Arguments...>;
#else
  static const Run chosen = run_baseline<Kernel, Arguments...>;
#endif
  return chosen(arguments...);
}

}  // namespace gptq
