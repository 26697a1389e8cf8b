// Which instruction sets this machine has, and the choice of a level from a priority list.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gptq {

inline constexpr uint32_t kCpuAvx2 = 1u << 0;
inline constexpr uint32_t kCpuFma = 1u << 1;
inline constexpr uint32_t kCpuF16c = 1u << 2;
inline constexpr uint32_t kCpuAvx512f = 1u << 3;
inline constexpr uint32_t kCpuAvx512bw = 1u << 4;
inline constexpr uint32_t kCpuAvx512vl = 1u << 5;
inline constexpr uint32_t kCpuAvx512dq = 1u << 6;
inline constexpr uint32_t kCpuAvx512vnni = 1u << 7;
inline constexpr uint32_t kCpuAvx512bf16 = 1u << 8;
inline constexpr uint32_t kCpuAvxVnni = 1u << 9;
inline constexpr uint32_t kCpuAmxInt8 = 1u << 10;  ///< and leave of the operating system to use tiles

/// One entry of a priority list: the features that all have to be there.
struct CpuLevel {
  const char* name;
  uint32_t required;
};

/// The features that the processor has and the operating system keeps the registers of. Asks Linux for leave to use AMX
/// tiles, once for the process.
uint32_t cpu_features();

/// The index in levels, best first, of the level to use on a machine with these features.
/// @param forced the name of one level, as GPTQ_CPU_ISA gives it; null or empty takes the best. A name that is not in
///        the list, or whose features are missing, is an error that lists what there is.
size_t select_cpu_level(const std::vector<CpuLevel>& levels, uint32_t features, const char* forced);

}  // namespace gptq
