// The shapes that tests and benchmarks of the packed linear share.
#pragma once

#include <cstdint>

namespace gptq::shapes {

struct Linear {
  int64_t m, k, n, group_size;
};

/// Sizes of 1, primes, and one more or less than a vector (16), an atom (8), a register tile, a group and a span.
inline constexpr Linear kAwkward[] = {
    {1, 1, 1, -1},      {1, 1, 1, 1},        {2, 7, 17, 3},       {3, 8, 16, 8},       {4, 9, 15, 4},
    {5, 5, 33, 5},      {1, 100, 37, 5},     {6, 127, 31, 128},   {7, 128, 64, 128},   {8, 129, 65, 128},
    {9, 131, 97, 13},   {2, 160, 48, 20},    {3, 191, 63, 64},    {4, 200, 49, 192},   {5, 257, 80, 256},
    {1, 300, 129, -1},  {3, 520, 16, 129},   {2, 1023, 34, 32},   {3, 1025, 47, 1000}, {2, 1152, 20, -1},
    {1, 2304, 67, 128}, {33, 136, 144, 136}, {70, 1030, 200, 64}, {257, 96, 24, 32},   {3, 61, 5, 1000},
};

/// (K, N) of the linears of GPT-2, GPT-2 XL and Llama-3-8B.
struct Weight {
  int64_t k, n;
};
inline constexpr Weight kGpt2[] = {{768, 2304}, {768, 768}, {768, 3072}, {3072, 768}};
inline constexpr Weight kGpt2Xl[] = {{1600, 4800}, {1600, 1600}, {1600, 6400}, {6400, 1600}};
inline constexpr Weight kLlama3[] = {{4096, 6144}, {4096, 4096}, {4096, 28672}, {14336, 4096}};

}  // namespace gptq::shapes
