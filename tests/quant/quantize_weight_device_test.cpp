// The solver on a device other than the CPU. This one is made for the test: its memory is that of the host, its
// operators are those of the CPU, and an operator on tensors of both is noted, which on a real device is an error.
#include "tests/quant/kernels_on_host.h"
// After what runs the kernels.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <gptq/gptq_layer.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "tests/quant/random_layer.h"

namespace gptq {
namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

std::vector<std::string> mixed_calls;
int64_t calls = 0;

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::malloc(bytes);
    return {memory, memory, &std::free, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceAllocator allocator;

using Sizes = c10::SymIntArrayRef;
using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Device = std::optional<at::Device>;
using Pinned = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;

at::Tensor empty(Sizes sizes, Dtype dtype, Layout, Device, Pinned, Format format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &allocator, kKeys, dtype.value_or(at::kFloat),
                                   format);
}

at::Tensor empty_strided(Sizes sizes, Sizes strides, Dtype dtype, Layout, Device, Pinned) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), &allocator,
                                           kKeys, dtype.value_or(at::kFloat));
}

at::Tensor as_strided(const at::Tensor& self, Sizes sizes, Sizes strides, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                           offset ? std::optional(offset->expect_int()) : std::nullopt);
}

at::Tensor view(const at::Tensor& self, Sizes sizes) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(sizes));
}

at::Tensor reshape_alias(const at::Tensor& self, Sizes sizes, Sizes strides) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

at::Tensor seen_by_host(const at::Tensor& tensor) {
  return at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       at::TensorOptions().dtype(tensor.scalar_type()));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  seen_by_host(to).copy_(seen_by_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) {
    EXPECT_EQ(to.numel(), 0) << "an output of another size";
    const at::Tensor fresh = at::detail::empty_generic(self.sizes(), &allocator, kKeys, to.scalar_type(), std::nullopt);
    to.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
    to.unsafeGetTensorImpl()->set_sizes_contiguous(self.sizes());
  }
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  return seen_by_host(self).item();
}

// Tensors of one element may be of the CPU anywhere.
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  bool has_device = false, has_cpu = false;
  const auto see = [&](const at::Tensor& tensor) {
    has_device |= tensor.defined() && tensor.device() == kDevice;
    has_cpu |= tensor.defined() && tensor.is_cpu() && tensor.dim() > 0;
  };
  for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) {
      see(argument.toTensor());
    } else if (argument.isTensorList()) {
      const std::vector<at::Tensor> tensors = argument.toTensorVector();
      std::for_each(tensors.begin(), tensors.end(), see);
    }
  }
  if (has_device && has_cpu) {
    mixed_calls.push_back(op.operator_name().name);
  }
  ++calls;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, c10::impl::NoOpDeviceGuardImpl<kType>);

LayerStatistics moved(const LayerStatistics& statistics) {
  const auto of = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(kDevice) : tensor; };
  return {of(statistics.hessian),      of(statistics.drift),      of(statistics.mean), of(statistics.float_mean),
          of(statistics.half_hessian), of(statistics.half_drift), statistics.nsamples};
}

void expect_same_on_device(const at::Tensor& found, const at::Tensor& expected) {
  ASSERT_EQ(found.defined(), expected.defined());
  if (expected.defined()) {
    EXPECT_EQ(found.device(), kDevice);
    EXPECT_TRUE(at::equal(found.cpu(), expected));
  }
}

void expect_same(const at::Tensor& weight, const LayerStatistics& statistics, const QuantizeOptions& options) {
  const test::KernelsOnHost kernels(kType);
  const QuantizeResult expected = quantize_weight(weight, statistics, options);
  const at::Tensor device_weight = weight.to(kDevice);
  const LayerStatistics device_statistics = moved(statistics);
  calls = 0;
  const QuantizeResult found = quantize_weight(device_weight, device_statistics, options);
  EXPECT_GT(calls, 0);
  EXPECT_EQ(mixed_calls, std::vector<std::string>());
  expect_same_on_device(found.codes, expected.codes);
  expect_same_on_device(found.scales, expected.scales);
  expect_same_on_device(found.zeros, expected.zeros);
  expect_same_on_device(found.input_order, expected.input_order);
  expect_same_on_device(found.dequantize(), expected.dequantize());
}

TEST(QuantizeWeightDevice, KeepsEverythingThere) {
  const test::RandomLayer layer = test::random_layer(70, 150, 3);
  LayerStatistics statistics;
  statistics.hessian = layer.hessian;
  for (const char* mode : {"default", "classic", "rtn"}) {
    for (const char* order : {"auto", "static", "dynamic", "off"}) {
      for (const int64_t group_size : {-1, 32}) {
        QuantizeOptions options;
        options.mode = mode;
        options.act_order = order;
        options.group_size = group_size;
        options.symmetric = group_size == 32;
        expect_same(layer.weight, statistics, options);
      }
    }
  }
  QuantizeOptions options;
  options.per_tensor = true;
  expect_same(layer.weight, statistics, options);
  options.mode = "rtn";
  options.per_tensor = false;
  options.scale_search = "weighted";
  expect_same(layer.weight, {}, options);
}

TEST(QuantizeWeightDevice, KeepsAllStatisticsThere) {
  const test::RandomLayer layer = test::random_layer(70, 90, 4);
  GPTQLayer gatherer(layer.weight.to(at::kFloat), at::zeros({70}));
  const at::Tensor inputs = layer.inputs.to(at::kFloat) + 0.5;
  gatherer.add_batch(inputs, inputs + 0.1 * inputs.roll(1, 1));
  QuantizeOptions options;
  options.group_size = 32;
  options.search_damping = options.correct_bias = true;
  expect_same(layer.weight, gatherer.statistics(), options);
}

}  // namespace
}  // namespace gptq
