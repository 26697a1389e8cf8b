// CUDA kernels of this library on the host: a test file includes this, then a .cu file, is compiled by g++ with
// -ffp-contract=off, and calls the .cu file's launchers with host memory; synchronize() then runs what they launched.
//
// Thread blocks run one after another on one host thread. The threads of a block are fibers, run in an order shuffled
// for every block, each until it reaches a barrier or a warp operation that others have yet to reach. What a device
// may do but need not, happens here at its worst:
//  - shared memory holds 0xcb.. before each block (but __shared__ variables of templates keep what they held);
//  - copy_async fills its destination with 0xcb.. at once and copies only when its thread waits for it;
//  - a launch that overlaps runs up to wait_for_kernel_ahead() before the kernel ahead of it begins.
// A barrier or warp operation that not all of its threads reach, a lane that is not in its own mask, and an unaligned
// copy_async throw std::runtime_error from synchronize(), or from the next launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/launch.h"
#include "cuda/ptx.h"

#undef __shared__
#define __shared__ static __attribute__((section("gptq_cuda_shared")))
#undef __launch_bounds__
#define __launch_bounds__(...)

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace gptq::cuda_on_host {

/// What device_limits() says; a test may change it.
inline DeviceLimits device = {3, 227 * 1024, true};

/// Runs all that was launched.
void synchronize();

/// How many kernels have run.
int64_t kernels_run();

void enqueue(std::function<void()> kernel, const LaunchShape& shape);

/// A barrier of the thread block. All threads must reach it, none may have ended.
void block_barrier();

/// The in and out of each lane of a warp; null for lanes that are not in the mask.
struct Exchange {
  const void* in[32];
  void* out[32];
};

/// Waits for the lanes of the mask; the last one to come calls `complete`. Lanes meet at calls of the same name.
void warp_meet(uint32_t mask, const char* name, const void* in, void* out,
               const std::function<void(Exchange&)>& complete);

/// out[lane] = result(lane, in) for the lanes of the mask, where in(other) is what lane `other` brought.
template <class In, class Result>
auto warp_exchange(uint32_t mask, const char* name, const In& mine, const Result& result) {
  const auto read_nothing = [&](int) -> const In& { return mine; };
  using Out = std::decay_t<decltype(result(0, read_nothing))>;
  Out out{};
  warp_meet(mask, name, &mine, &out, [&](Exchange& all) {
    const auto in = [&](int lane) -> const In& {
      if (all.in[lane] == nullptr) throw std::runtime_error(std::string(name) + " reads a lane outside of its mask");
      return *static_cast<const In*>(all.in[lane]);
    };
    for (int lane = 0; lane < 32; ++lane)
      if (all.out[lane] != nullptr) *static_cast<Out*>(all.out[lane]) = result(lane, in);
  });
  return out;
}

/// The combination of what all lanes of the mask brought, for all of them.
template <class T, class Combine>
T warp_reduce(uint32_t mask, const char* name, T mine, const Combine& combine) {
  return warp_exchange(mask, name, mine, [&](int, const auto& in) {
    int lane = std::countr_zero(mask);
    T total = in(lane);
    while (++lane < 32)
      if (mask >> lane & 1) total = combine(total, in(lane));
    return total;
  });
}

template <class T>
struct Shuffle {
  T value;
  int source;
};

/// As the shuffles do, a lane that would read outside of its mask or of its segment keeps its own.
template <class T>
T warp_shuffle(uint32_t mask, const char* name, T value, int source) {
  return warp_exchange(mask, name, Shuffle<T>{value, source},
                       [&](int lane, const auto& in) { return in(in(lane).source).value; });
}

inline int lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

/// Memory of a test's kernel: exactly so many elements, filled with 0xff.., with guards around.
template <class T>
class Memory {
 public:
  /// @param misalignment bytes by which the first element misses alignment to 64
  explicit Memory(int64_t elements, int64_t misalignment = 0)
      : bytes_(elements * static_cast<int64_t>(sizeof(T))),
        storage_(static_cast<char*>(std::aligned_alloc(64, (bytes_ + 3 * kGuard + 63) / 64 * 64))),
        begin_(storage_.get() + kGuard + misalignment) {
    std::memset(storage_.get(), kPattern, kGuard + misalignment);
    std::memset(begin_, 0xff, bytes_);
    std::memset(begin_ + bytes_, kPattern, kGuard);
    protect(true);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { protect(false); }

  T* data() { return reinterpret_cast<T*>(begin_); }
  /// Whether nothing was written outside. With AddressSanitizer, reads outside are errors too.
  bool intact() {
    protect(false);
    bool same = true;
    for (const char* at = storage_.get(); at != begin_; ++at) same &= *at == kPattern;
    for (int i = 0; i < kGuard; ++i) same &= begin_[bytes_ + i] == kPattern;
    protect(true);
    return same;
  }

 private:
  static constexpr int64_t kGuard = 256;
  static constexpr char kPattern = 0x5a;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };

  void protect(bool on);

  int64_t bytes_;
  std::unique_ptr<char, Free> storage_;
  char* begin_;
};

void protect_memory(const char* begin, const char* end, bool on);

template <class T>
void Memory<T>::protect(bool on) {
  protect_memory(storage_.get(), begin_, on);
  protect_memory(begin_ + bytes_, begin_ + bytes_ + kGuard, on);
}

}  // namespace gptq::cuda_on_host

namespace gptq {

inline cudaError_t device_limits(DeviceLimits& limits) {
  limits = cuda_on_host::device;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
                   const Arguments&... arguments) {
  const auto fits = [](const dim3& grid) { return grid.x && grid.y && grid.z && grid.y < 65536 && grid.z < 65536; };
  if (!fits(shape.grid) || !fits(shape.block) || shape.block.x * shape.block.y * shape.block.z > 1024 ||
      shape.shared_bytes > static_cast<size_t>(cuda_on_host::device.shared_bytes))
    return cudaErrorInvalidConfiguration;
  cuda_on_host::enqueue([=] { kernel(static_cast<Parameters>(arguments)...); }, shape);
  return cudaSuccess;
}

template <int kPending>
void wait_for_copies();
namespace cuda_on_host {
void wait_for_copies(int pending);
}
template <int kPending>
void wait_for_copies() {
  cuda_on_host::wait_for_copies(kPending);
}

}  // namespace gptq

// What CUDA C++ declares for kernels.
// NOLINTBEGIN(readability-identifier-naming)
inline void __syncthreads() {
  gptq::cuda_on_host::block_barrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  gptq::cuda_on_host::warp_meet(mask, "__syncwarp", &mask, &mask, [](auto&) {});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = gptq::cuda_on_host::lane(), source = lane ^ bits;
  return gptq::cuda_on_host::warp_shuffle(mask, "__shfl_xor_sync", value,
                                          source < lane / width * width + width ? source : lane);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return gptq::cuda_on_host::warp_reduce(mask, "__reduce_add_sync", value, std::plus<T>());
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return gptq::cuda_on_host::warp_reduce(mask, "__reduce_max_sync", value, [](T a, T b) { return a < b ? b : a; });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

inline float __fadd_rn(float a, float b) {
  return a + b;
}
inline float __fsub_rn(float a, float b) {
  return a - b;
}
inline float __fmul_rn(float a, float b) {
  return a * b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}

inline float __int_as_float(int bits) {
  return std::bit_cast<float>(bits);
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline float __int2float_rn(int value) {
  return static_cast<float>(value);
}
/// Saturates, and turns a NaN into 0, as the device does.
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  const float rounded = std::nearbyint(value);
  if (rounded >= 0x1p31f) return std::numeric_limits<int>::max();
  return rounded < -0x1p31f ? std::numeric_limits<int>::min() : static_cast<int>(rounded);
}
// NOLINTEND(readability-identifier-naming)
