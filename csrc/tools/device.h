#pragma once

#include <c10/core/Device.h>

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "model/checkpoint.h"

namespace gptq::tools {

/// Adds --device: cpu, cuda or cuda:N.
void add_device_option(CLI::App& command, std::string& device);

/// The device that --device names, ready to compute on. torch's CUDA libraries are loaded for a CUDA device alone.
/// @throws c10::Error naming what is missing: CUDA in libgptq or in torch, a device, or the device of that index
at::Device open_device(const std::string& name);

/// Puts a loaded model on the device. On the CPU it stays as it is.
/// @throws c10::Error where its code is compiled for a device already
void move_to(LoadedModel& model, at::Device device);

/// Adds --compute: how packed linears multiply, exact, bf16 or int8; where it is not given compute stays, "" for as the
/// model says.
void add_compute_option(CLI::App& command, std::string& compute);

/// Makes a loaded model that has not run yet compute so; "": as it says.
/// @throws c10::Error where it has no packed linear, or where its code is compiled already
void set_compute(const LoadedModel& model, const std::string& compute);

/// Waits for all work on the device.
void synchronize(at::Device device);

/// The most bytes of tensors that the device has held since it was opened; 0 for the CPU.
int64_t peak_bytes(at::Device device);

}  // namespace gptq::tools
