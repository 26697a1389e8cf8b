#include "tools/device.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <gptq/quantize_module.h>
#include <torch/csrc/jit/passes/tensorexpr_fuser.h>

#include <charconv>
#include <optional>
#include <string_view>

#include "rewrite/placement.h"

namespace gptq::tools {
namespace {

constexpr std::string_view kCuda = "cuda";

/// The index in "cuda" or "cuda:N"; nothing, if it is neither.
std::optional<int> cuda_index(std::string_view name) {
  if (name == kCuda) {
    return 0;
  }
  if (!name.starts_with("cuda:")) {
    return std::nullopt;
  }
  name.remove_prefix(kCuda.size() + 1);
  int index = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), index);
  const bool is_index = error == std::errc() && end == name.data() + name.size() && index >= 0 && name[0] != '-';
  return is_index ? std::optional(index) : std::nullopt;
}

CLI::Validator device_check() {
  return {[](std::string& name) {
            return name == "cpu" || cuda_index(name) ? std::string() : "must be cpu, cuda or cuda:N, got " + name;
          },
          "cpu|cuda|cuda:N"};
}

bool has_cuda_kernels() {
  const auto linear = c10::Dispatcher::singleton().findSchemaOrThrow("gptq::linear_w4", "");
  return linear.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
}

/// Nothing that the driver links needs torch's CUDA libraries, which cost every start 0.4 s and 350 MB.
void load_cuda_libraries() {
  static void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL);
  TORCH_CHECK(library != nullptr, "--device: cuda needs the CUDA libraries of torch, which do not load: ", dlerror());
}

/// Keeps the last warning in place of printing it.
class WarningKeeper final : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { text_ = warning.msg(); }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

int count_cuda_devices(std::string& reason) {
  WarningKeeper keeper;
  const c10::WarningUtils::WarningHandlerGuard guard(&keeper);
  const auto count = static_cast<int>(at::detail::getCUDAHooks().deviceCount());
  reason = keeper.text();
  return count;
}

at::Device open_cuda(int index) {
  TORCH_CHECK(has_cuda_kernels(), "--device: cuda needs a libgptq that was built with GPTQ_CUDA, this one was not");
  load_cuda_libraries();
  std::string reason;
  const int count = count_cuda_devices(reason);
  TORCH_CHECK(count > 0, "--device: cuda needs a CUDA device, there is none", reason.empty() ? "" : ": ", reason);
  TORCH_CHECK(index < count, "--device: the index of a CUDA device must be in 0..", count - 1, ", got ", index);
  // Its kernels are compiled while the model runs, anew for every shape.
  torch::jit::setTensorExprFuserEnabled(false);
  return {at::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

}  // namespace

void add_device_option(CLI::App& command, std::string& device) {
  command.add_option("--device", device, "Where to compute")->capture_default_str()->check(device_check());
}

at::Device open_device(const std::string& name) {
  const std::optional<int> index = cuda_index(name);
  return index ? open_cuda(*index) : at::Device(at::kCPU);
}

void move_to(LoadedModel& model, at::Device device) {
  if (device.is_cpu()) {
    return;
  }
  TORCH_CHECK(model.kind != ModelKind::kAotInductor, model.source,
              ": must be run with --device cpu, which it is compiled for, got ", device);
  model.module = rewrite::copy_to(model.module, device);
}

void add_compute_option(CLI::App& command, std::string& compute) {
  command.add_option("--compute", compute, "What packed linears take their inputs as: float32, 16 bits or 8 bits")
      ->default_str(compute.empty() ? "as the model says" : compute)
      ->check(CLI::IsMember({"exact", "bf16", "int8"}));
}

void set_compute(const LoadedModel& model, const std::string& compute) {
  if (compute.empty()) {
    return;
  }
  TORCH_CHECK(model.kind != ModelKind::kAotInductor, model.source,
              ": must be run without --compute, since its code is compiled already, got ", compute);
  TORCH_CHECK(set_linear_compute(model.module, compute) > 0, model.source,
              ": must have packed linears to be run with --compute ", compute, ", has none");
}

void synchronize(at::Device device) {
  if (!device.is_cpu()) {
    c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
  }
}

int64_t peak_bytes(at::Device device) {
  if (device.is_cpu()) {
    return 0;
  }
  constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return at::accelerator::getDeviceStats(device.index()).allocated_bytes.at(kAll).peak;
}

}  // namespace gptq::tools
