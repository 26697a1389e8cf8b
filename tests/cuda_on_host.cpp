#include "tests/cuda_on_host.h"

#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <exception>
#include <optional>
#include <random>
#include <sstream>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

// The bounds of the section of __shared__ variables, by the linker; absent where there are none.
extern "C" {
extern char __start_gptq_cuda_shared[] __attribute__((weak));  // NOLINT(readability-identifier-naming)
extern char __stop_gptq_cuda_shared[] __attribute__((weak));   // NOLINT(readability-identifier-naming)
}

namespace gptq::cuda_on_host {
namespace {

constexpr int kPoison = 0xcb;
constexpr size_t kStackBytes = 128 * 1024;

struct Kernel {
  std::function<void()> run;
  LaunchShape shape;
};

std::deque<Kernel> stream;
int64_t finished_kernels = 0;

struct Copy {
  void* shared;
  const void* global;
};

struct Meeting {
  uint32_t mask;
  const char* name;
  uint32_t arrived = 0;
  Exchange all = {};
};

struct Thread {
  ucontext_t context;
  uint3 index;
  int warp, lane;
  const char* waits_for = nullptr;  // what it has reached, null while it can run
  bool ended = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> batches;
};

// One thread block that runs.
class Block {
 public:
  Block(const Kernel& kernel, dim3 index, std::vector<std::unique_ptr<char[]>>& stacks, std::minstd_rand& random)
      : kernel_(kernel), index_(index), shared_(kernel.shape.shared_bytes / 16 + 1) {
    std::memset(shared_.data(), kPoison, shared_.size() * sizeof(uint4));
    if (__start_gptq_cuda_shared != nullptr)
      std::memset(__start_gptq_cuda_shared, kPoison, __stop_gptq_cuda_shared - __start_gptq_cuda_shared);
    const dim3 size = kernel.shape.block;
    threads_.resize(size_t{size.x} * size.y * size.z);
    meetings_.resize((threads_.size() + 31) / 32);
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (stacks.size() <= i) stacks.emplace_back(new char[kStackBytes]);
      Thread& thread = threads_[i];
      const auto at = static_cast<unsigned>(i);
      thread.index = {at % size.x, at / size.x % size.y, at / size.x / size.y};
      thread.warp = static_cast<int>(i / 32);
      thread.lane = static_cast<int>(i % 32);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = stacks[i].get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::enter, 0);
      order_.push_back(i);
    }
    std::shuffle(order_.begin(), order_.end(), random);
  }

  void run();

  // Called by the thread that runs.
  void pause(const char* waits_for) {
    Thread& thread = *running_;
    thread.waits_for = waits_for;
    swapcontext(&thread.context, &scheduler_);
  }
  [[noreturn]] void end() {
    Thread& thread = *running_;
    thread.ended = true;
    swapcontext(&thread.context, &scheduler_);
    std::terminate();
  }
  void reach_barrier();
  void meet(uint32_t mask, const char* name, const void* in, void* out, const std::function<void(Exchange&)>& complete);
  void wait_for_kernel_ahead();

  Thread& running() { return *running_; }
  char* shared() { return reinterpret_cast<char*>(shared_.data()); }

 private:
  static void enter();
  std::string describe_deadlock() const;

  const Kernel& kernel_;
  dim3 index_;
  std::vector<uint4> shared_;
  std::vector<Thread> threads_;
  std::vector<size_t> order_;
  std::vector<std::vector<Meeting>> meetings_;  // of each warp
  size_t at_barrier_ = 0;
  bool wants_kernel_ahead_ = false;
  Thread* running_ = nullptr;
  ucontext_t scheduler_;
  std::exception_ptr error_;
};

Block* block = nullptr;
std::optional<Kernel> kernel_ahead;  // which an overlapping kernel has yet to wait for

void run_kernel(const Kernel& kernel);

void run_kernel_ahead() {
  if (!kernel_ahead) return;
  const Kernel kernel = std::move(*kernel_ahead);
  kernel_ahead.reset();
  run_kernel(kernel);
}

void Block::enter() {
  try {
    block->kernel_.run();
  } catch (...) {
    block->error_ = std::current_exception();
  }
  block->end();
}

void Block::run() {
  size_t ended = 0;
  while (ended < threads_.size()) {
    bool progress = false;
    for (const size_t i : order_) {
      Thread& thread = threads_[i];
      if (thread.ended || thread.waits_for != nullptr) continue;
      progress = true;
      running_ = &thread;
      block = this;
      threadIdx = thread.index;
      blockIdx = {index_.x, index_.y, index_.z};
      blockDim = kernel_.shape.block;
      gridDim = kernel_.shape.grid;
      swapcontext(&scheduler_, &thread.context);
      if (error_) std::rethrow_exception(error_);
      if (thread.ended) ++ended;
      if (std::exchange(wants_kernel_ahead_, false)) run_kernel_ahead();
    }
    if (!progress) throw std::runtime_error(describe_deadlock());
  }
}

void Block::reach_barrier() {
  if (++at_barrier_ < threads_.size()) return pause("__syncthreads");
  at_barrier_ = 0;
  for (Thread& thread : threads_) thread.waits_for = nullptr;
}

void Block::meet(uint32_t mask, const char* name, const void* in, void* out,
                 const std::function<void(Exchange&)>& complete) {
  const Thread& thread = *running_;
  if ((mask >> thread.lane & 1) == 0) throw std::runtime_error(std::string(name) + ": a lane is not in its own mask");
  auto& meetings = meetings_[thread.warp];
  auto meeting = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& open) {
    return open.mask == mask && std::strcmp(open.name, name) == 0;
  });
  if (meeting == meetings.end()) meeting = meetings.insert(meetings.end(), Meeting{mask, name});
  meeting->arrived |= 1u << thread.lane;
  meeting->all.in[thread.lane] = in;
  meeting->all.out[thread.lane] = out;
  if (meeting->arrived != mask) return pause(name);
  Exchange all = meeting->all;
  meetings.erase(meeting);
  complete(all);
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) threads_[size_t{32} * thread.warp + lane].waits_for = nullptr;
}

void Block::wait_for_kernel_ahead() {
  if (!kernel_ahead) return;
  wants_kernel_ahead_ = true;
  pause(nullptr);
}

std::string Block::describe_deadlock() const {
  std::ostringstream text;
  text << "block (" << index_.x << ", " << index_.y << ", " << index_.z << ") is stuck:";
  for (size_t i = 0; i < threads_.size(); ++i)
    text << (i % 32 == 0 ? "\n  " : ", ") << "thread " << i << " "
         << (threads_[i].ended ? "has ended" : threads_[i].waits_for);
  return text.str();
}

void run_kernel(const Kernel& kernel) {
  // A kernel ahead of another runs inside of it, with stacks and shared memory of its own.
  std::vector<std::unique_ptr<char[]>> stacks;
  static std::minstd_rand random;
  Block* const outer = block;
  const std::vector<char> outer_shared(__start_gptq_cuda_shared, __stop_gptq_cuda_shared);
  const dim3 grid = kernel.shape.grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) Block(kernel, {x, y, z}, stacks, random).run();
  block = outer;
  std::copy(outer_shared.begin(), outer_shared.end(), __start_gptq_cuda_shared);
  ++finished_kernels;
}

}  // namespace

void enqueue(std::function<void()> kernel, const LaunchShape& shape) {
  stream.push_back({std::move(kernel), shape});
}

void synchronize() {
  std::deque<Kernel> kernels = std::exchange(stream, {});
  try {
    while (!kernels.empty()) {
      const Kernel kernel = std::move(kernels.front());
      kernels.pop_front();
      if (!kernels.empty() && kernels.front().shape.overlaps) {
        run_kernel_ahead();
        kernel_ahead = kernel;
        continue;
      }
      run_kernel(kernel);
      run_kernel_ahead();
    }
  } catch (...) {
    kernel_ahead.reset();
    block = nullptr;
    throw;
  }
}

int64_t kernels_run() {
  return finished_kernels;
}

void block_barrier() {
  block->reach_barrier();
}

void warp_meet(uint32_t mask, const char* name, const void* in, void* out,
               const std::function<void(Exchange&)>& complete) {
  block->meet(mask, name, in, out, complete);
}

void wait_for_copies(int pending) {
  auto& batches = block->running().batches;
  for (; static_cast<int>(batches.size()) > pending; batches.pop_front())
    for (const Copy& copy : batches.front()) std::memcpy(copy.shared, copy.global, 16);
}

void protect_memory(const char* begin, const char* end, bool on) {
#ifdef __SANITIZE_ADDRESS__
  if (on) {
    __asan_poison_memory_region(begin, end - begin);
  } else {
    __asan_unpoison_memory_region(begin, end - begin);
  }
#else
  static_cast<void>(begin), static_cast<void>(end), static_cast<void>(on);
#endif
}

}  // namespace gptq::cuda_on_host

namespace gptq {

char* shared_memory() {
  return cuda_on_host::block->shared();
}

void multiply_add_u8_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint2 b) {
  struct Operands {
    int32_t c[4];
    uint32_t a[4], b[2];
  };
  struct Sums {
    int32_t c[4];
  };
  Operands mine = {{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b.x, b.y}};
  // PTX: sum i of lane 4·g + t is row g (+ 8 from i = 2 on) and column 2·t + i % 2; byte j of register r of a, in lane
  // 4·g + t, is row g (+ 8 if r is odd) and k = 4·t + j (+ 16 from r = 2 on); byte j of register r of b is
  // k = 4·t + j + 16·r of column g.
  const Sums sums = cuda_on_host::warp_exchange(0xffffffffu, "mma", mine, [](int lane, const auto& in) {
    Sums result;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      uint32_t total = static_cast<uint32_t>(in(lane).c[i]);  // wraps around, as the device's sums do
      for (int quad = 0; quad < 8; ++quad) {
        const uint32_t x = in(row % 8 * 4 + quad % 4).a[row / 8 + quad / 4 * 2];
        const uint32_t y = in(column * 4 + quad % 4).b[quad / 4];
        for (int j = 0; j < 32; j += 8)
          total += static_cast<uint32_t>(static_cast<uint8_t>(x >> j) * static_cast<int8_t>(y >> j));
      }
      result.c[i] = static_cast<int32_t>(total);
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) c[i] = sums.c[i];
}

void copy_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    throw std::runtime_error("copy_async: an address is not aligned to 16 bytes");
  std::memset(shared, cuda_on_host::kPoison, 16);
  cuda_on_host::block->running().open.push_back({shared, global});
}

void end_copy_batch() {
  auto& thread = cuda_on_host::block->running();
  thread.batches.push_back(std::exchange(thread.open, {}));
}

void wait_for_kernel_ahead() {
  cuda_on_host::block->wait_for_kernel_ahead();
}

void let_next_kernel_begin() {}

}  // namespace gptq
