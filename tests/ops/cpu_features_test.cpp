#include "cpu/cpu_features.h"

#include <gtest/gtest.h>

#include "cpu/linear_w4_cpu.h"
#include "tests/error_of.h"

namespace gptq {
namespace {

const std::vector<CpuLevel> kLevels = {{"wide", kCpuAvx2 | kCpuAvx512f}, {"narrow", kCpuAvx2}, {"scalar", 0}};

TEST(CpuFeatures, TheBestAvailableLevelIsTaken) {
  EXPECT_EQ(select_cpu_level(kLevels, kCpuAvx2 | kCpuAvx512f | kCpuFma, nullptr), 0u);
  EXPECT_EQ(select_cpu_level(kLevels, kCpuAvx512f, nullptr), 2u);  // one of two required features is not enough
  EXPECT_EQ(select_cpu_level(kLevels, kCpuAvx2, ""), 1u);
  EXPECT_EQ(select_cpu_level(kLevels, 0, nullptr), 2u);
}

TEST(CpuFeatures, ALevelCanBeForced) {
  EXPECT_EQ(select_cpu_level(kLevels, kCpuAvx2 | kCpuAvx512f, "narrow"), 1u);
  EXPECT_EQ(select_cpu_level(kLevels, kCpuAvx2 | kCpuAvx512f, "scalar"), 2u);
}

TEST(CpuFeatures, AnUnknownOrUnavailableLevelThrows) {
  EXPECT_ERROR(select_cpu_level(kLevels, kCpuAvx2, "sse9"),
               "GPTQ_CPU_ISA must be one of wide, narrow, scalar that this machine has (narrow, scalar), got sse9");
  EXPECT_ERROR(select_cpu_level(kLevels, kCpuAvx2, "wide"),
               "GPTQ_CPU_ISA must be one of wide, narrow, scalar that this machine has (narrow, scalar), got wide");
}

#if defined(__x86_64__)
TEST(CpuFeatures, DetectionAgreesWithTheCompiler) {
  const auto has = [](uint32_t feature) { return (cpu_features() & feature) != 0; };
  EXPECT_EQ(has(kCpuAvx2), __builtin_cpu_supports("avx2") != 0);
  EXPECT_EQ(has(kCpuFma), __builtin_cpu_supports("fma") != 0);
  EXPECT_EQ(has(kCpuAvx512f), __builtin_cpu_supports("avx512f") != 0);
  EXPECT_EQ(has(kCpuAvx512bw), __builtin_cpu_supports("avx512bw") != 0);
  EXPECT_EQ(has(kCpuAvx512vl), __builtin_cpu_supports("avx512vl") != 0);
  EXPECT_EQ(has(kCpuAvx512dq), __builtin_cpu_supports("avx512dq") != 0);
  EXPECT_EQ(has(kCpuAvx512vnni), __builtin_cpu_supports("avx512vnni") != 0);
  EXPECT_TRUE(!has(kCpuAmxInt8) || __builtin_cpu_supports("amx-int8"));  // not without the system's leave
}
#endif

TEST(CpuFeatures, EveryMachineHasScalar) {
  const auto levels = linear_w4_cpu_levels();
  ASSERT_FALSE(levels.empty());
  EXPECT_EQ(levels.back().name, "scalar");
}

}  // namespace
}  // namespace gptq
