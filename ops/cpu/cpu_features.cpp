#include "cpu/cpu_features.h"

#include <c10/util/Exception.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gptq {
namespace {

#if defined(__x86_64__)
// XCR0: which register state the operating system saves.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux gives a process the 8 KB of tile registers only when it asks.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

uint32_t detect() {
  uint32_t eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
  constexpr uint32_t kOsXsave = 1u << 27, kFma = 1u << 12, kF16c = 1u << 29;
  if (!(ecx & kOsXsave)) return 0;
  const uint64_t state = saved_state();
  constexpr uint64_t kYmm = 0x06, kZmm = 0xe6;  // SSE and AVX; also masks and the two halves of zmm
  constexpr uint64_t kTiles = 0x60000;          // configuration and data
  if ((state & kYmm) != kYmm) return 0;
  uint32_t features = 0;
  const auto add = [&](uint32_t word, int bit, uint32_t feature) { features |= (word >> bit) & 1 ? feature : 0; };
  features |= (ecx & kFma ? kCpuFma : 0) | (ecx & kF16c ? kCpuF16c : 0);
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return features;
  add(ebx, 5, kCpuAvx2);
  const uint32_t structured = ebx, more = ecx, further = edx;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) eax = 0;
  add(eax, 4, kCpuAvxVnni);
  if ((state & kZmm) != kZmm) return features;
  add(structured, 16, kCpuAvx512f);
  add(structured, 17, kCpuAvx512dq);
  add(structured, 30, kCpuAvx512bw);
  add(structured, 31, kCpuAvx512vl);
  add(more, 11, kCpuAvx512vnni);
  add(eax, 5, kCpuAvx512bf16);
  constexpr uint32_t kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
  const bool has_amx = (further & kAmxTile) && (further & kAmxInt8) && (state & kTiles) == kTiles;
  features |= has_amx && may_use_tiles() ? kCpuAmxInt8 : 0;
  return features;
}
#else
uint32_t detect() {
  return 0;
}
#endif

}  // namespace

uint32_t cpu_features() {
  static const uint32_t features = detect();
  return features;
}

size_t select_cpu_level(const std::vector<CpuLevel>& levels, uint32_t features, const char* forced) {
  const std::string name = forced ? forced : "";
  std::string known, available;
  for (size_t i = 0; i < levels.size(); ++i) {
    const bool has = (levels[i].required & ~features) == 0;
    if (has && (name.empty() || name == levels[i].name)) return i;
    known += std::string(known.empty() ? "" : ", ") + levels[i].name;
    if (has) available += std::string(available.empty() ? "" : ", ") + levels[i].name;
  }
  TORCH_CHECK(false, "GPTQ_CPU_ISA must be one of ", known, " that this machine has (", available, "), got ", name);
}

}  // namespace gptq
