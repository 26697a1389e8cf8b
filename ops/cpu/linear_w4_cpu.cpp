#include "cpu/linear_w4_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>

#include "cpu/cpu_features.h"
#include "linear_w4_check.h"

namespace gptq {
namespace {

struct Candidate {
  CpuLevel level;
  const LinearW4Kernel* kernel;
};

constexpr uint32_t kAvx512vnni =
    kCpuAvx512f | kCpuAvx512bw | kCpuAvx512vl | kCpuAvx512dq | kCpuAvx512vnni | kCpuFma | kCpuF16c;

// Best first.
constexpr Candidate kCandidates[] = {
    {{"amx", kAvx512vnni | kCpuAmxInt8}, &kLinearW4Amx},
    {{"avx512vnni", kAvx512vnni}, &kLinearW4Avx512vnni},
    {{"avxvnni", kCpuAvxVnni | kCpuAvx2 | kCpuFma | kCpuF16c}, &kLinearW4AvxVnni},
    {{"avx2", kCpuAvx2 | kCpuFma | kCpuF16c}, &kLinearW4Avx2},
    {{"scalar", 0}, &kLinearW4Scalar},
};

const LinearW4Level& chosen_level() {
  static const LinearW4Level level = [] {
    std::vector<CpuLevel> levels;
    for (const Candidate& candidate : kCandidates) levels.push_back(candidate.level);
    const Candidate& best = kCandidates[select_cpu_level(levels, cpu_features(), std::getenv("GPTQ_CPU_ISA"))];
    return LinearW4Level{best.level.name, best.kernel};
  }();
  return level;
}

constexpr int64_t kRowBlock = 256;        // rows split into digits at a time: bounds the workspace
constexpr int64_t kColumnChunk = 4;       // blocks of 16 columns in one task
constexpr int64_t kSerialWork = 1 << 18;  // multiply-adds below which a second thread does not pay

void check_columns(const int32_t* columns, int64_t k) {
  for (int64_t i = 0; i < k; ++i)
    TORCH_CHECK(columns[i] >= 0 && columns[i] < k, "linear_w4: input_order must hold columns in 0..", k - 1, ", got ",
                columns[i], " at ", i);
}

void run_row_block(const LinearW4Kernel& kernel, const LinearW4Problem& p) {
  const int64_t split_grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, p.k));
  at::parallel_for(0, p.m, split_grain, [&](int64_t begin, int64_t end) { kernel.split(p, begin, end); });

  const int64_t blocks = (p.n + kAtomRows - 1) / kAtomRows;
  const int64_t column_chunks = (blocks + kColumnChunk - 1) / kColumnChunk;
  const int64_t tasks = (p.m + kernel.row_chunk - 1) / kernel.row_chunk * column_chunks;
  const int64_t task_work = std::min(p.m, kernel.row_chunk) * kColumnChunk * kAtomRows * std::max<int64_t>(1, p.k);
  at::parallel_for(0, tasks, std::max<int64_t>(1, kSerialWork / task_work), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row_chunk = begin / column_chunks;
      const int64_t stop = std::min(end, (row_chunk + 1) * column_chunks);
      kernel.multiply(p, row_chunk * kernel.row_chunk, std::min((row_chunk + 1) * kernel.row_chunk, p.m),
                      (begin - row_chunk * column_chunks) * kColumnChunk,
                      std::min((stop - row_chunk * column_chunks) * kColumnChunk, blocks));
      begin = stop;
    }
  });
}

void run(const LinearW4Kernel& kernel, LinearW4Problem p, const std::vector<LinearW4Group>& groups) {
  const int64_t rows = std::min(p.m, kRowBlock), total = p.m;
  const int64_t atoms = groups.empty() ? 0 : groups.back().digit_atom + groups.back().atoms;
  // One cache line more than the digits: AMX reads whole lines, and rows do not all start in the same cache set.
  p.digit_stride = (atoms * p.digits * kAtomColumns + 63) / 64 * 64 + 64;
  p.groups = groups.data();
  p.n_groups = static_cast<int64_t>(groups.size());
  const int64_t digit_rows = rows <= kUntiledRows ? rows : (rows + kDigitRows - 1) / kDigitRows * kDigitRows;
  const at::Tensor digits = at::empty({digit_rows * p.digit_stride}, at::kChar);
  const at::Tensor x_scales = at::empty({rows * p.n_groups}, at::kFloat);
  const at::Tensor x_offsets = at::empty({rows * p.n_groups * p.digits}, at::kInt);
  p.x_digits = digits.mutable_data_ptr<int8_t>();
  p.x_scales = x_scales.mutable_data_ptr<float>();
  p.x_offsets = x_offsets.mutable_data_ptr<int32_t>();
  for (int64_t row = 0; row < total; row += kRowBlock) {
    p.m = std::min(kRowBlock, total - row);
    run_row_block(kernel, p);
    const int64_t element = p.type == LinearW4Type::kF32 ? 4 : 2;
    p.x = static_cast<const char*>(p.x) + p.m * p.x_stride * element;
    p.y = static_cast<char*>(p.y) + p.m * p.n * element;
  }
}

template <int kBits>
at::Tensor linear_cpu(const at::Tensor& input, const at::Tensor& packed, const at::Tensor& scales,
                      const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& input_order, int64_t group_size, std::string_view compute) {
  return linear_w4_cpu_at_level(chosen_level(), kBits, input, packed, scales, zeros, bias, input_order, group_size,
                                compute);
}

}  // namespace

std::vector<LinearW4Level> linear_w4_cpu_levels() {
  std::vector<LinearW4Level> levels;
  for (const Candidate& candidate : kCandidates)
    if ((candidate.level.required & ~cpu_features()) == 0) levels.push_back({candidate.level.name, candidate.kernel});
  return levels;
}

at::Tensor linear_w4_cpu_at_level(const LinearW4Level& level, int bits, const at::Tensor& input,
                                  const at::Tensor& packed, const at::Tensor& scales,
                                  const std::optional<at::Tensor>& zeros, const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& input_order, int64_t group_size,
                                  std::string_view compute) {
  const LinearW4Arguments arguments =
      prepare_linear_w4(bits, input, packed, scales, zeros, bias, input_order, group_size, compute);
  LinearW4Problem p = {};
  static_cast<LinearW4Operands&>(p) = arguments.operands;
  if (p.order != nullptr) check_columns(p.order, p.k);
  if (p.m > 0 && p.n > 0) run(*level.kernel, p, linear_w4_groups(p.k, group_size));
  return arguments.y;
}

TORCH_LIBRARY_IMPL(gptq, CPU, m) {
  m.impl("linear_w4", linear_cpu<4>);
  m.impl("linear_w8", linear_cpu<8>);
}

}  // namespace gptq
