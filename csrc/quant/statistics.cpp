#include "quant/statistics.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/stack.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "quant/device_kernels.h"
#include "quant/read_scalars.h"

namespace gptq {
namespace {

// Largest difference between H and Hᵀ, as a share of the largest entry, that passes for rounding.
constexpr double kSymmetryTolerance = 1e-4;

double largest_size(const at::Tensor& values) {
  const auto ends = at::aminmax(values);
  const auto [least, most] = read_scalars(std::get<0>(ends), std::get<1>(ends));
  return std::max(std::abs(least), std::abs(most));
}

constexpr int64_t kTile = 32;

// largest[j] = max(largest[j], |a_ij - a_ji|) over i for the tile at (row, column), within the matrix.
template <typename T>
void compare_tiles(const T* values, int64_t k, int64_t row, int64_t column, T* largest) {
  const int64_t rows = std::min(kTile, k - row), columns = std::min(kTile, k - column);
  T mirrored[kTile][kTile];
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      mirrored[i][j] = values[(column + j) * k + row + i];
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const T difference = std::abs(values[(row + i) * k + column + j] - mirrored[i][j]);
      largest[j] = difference > largest[j] ? difference : largest[j];
    }
  }
}

// max |a_ij - a_ji|, tile by tile: a transposed copy would take longer than the factorisation of a small matrix.
template <typename T>
double largest_asymmetry_of(const T* values, int64_t k) {
  const auto of_rows = [&](int64_t begin, int64_t end, double so_far) {
    T largest[kTile] = {};
    for (int64_t row = begin * kTile; row < std::min(end * kTile, k); row += kTile) {
      for (int64_t column = 0; column <= row; column += kTile) {
        compare_tiles(values, k, row, column, largest);
      }
    }
    return std::max(so_far, static_cast<double>(*std::max_element(largest, largest + kTile)));
  };
  return at::parallel_reduce(0, (k + kTile - 1) / kTile, 1, 0.0, of_rows,
                             [](double a, double b) { return std::max(a, b); });
}

// max |a_ij - a_ji|, by blocks of rows on and right of the diagonal.
double largest_asymmetry_on_device(const at::Tensor& values) {
  constexpr int64_t block = 1024;
  const int64_t k = values.size(0);
  std::vector<at::Tensor> largest;
  largest.reserve((k + block - 1) / block);
  for (int64_t first = 0; first < k; first += block) {
    const int64_t count = std::min(block, k - first);
    const at::Tensor upper = values.narrow(0, first, count).narrow(1, first, k - first);
    const at::Tensor lower = values.narrow(1, first, count).narrow(0, first, k - first);
    largest.push_back(upper.sub(lower.t()).abs_().max());
  }
  return at::stack(largest).max().item<double>();
}

double largest_asymmetry(const at::Tensor& values) {
  if (solved_on_device(values)) {
    return largest_asymmetry_on_device(values);
  }
  return values.scalar_type() == at::kDouble ? largest_asymmetry_of(values.const_data_ptr<double>(), values.size(0))
                                             : largest_asymmetry_of(values.const_data_ptr<float>(), values.size(0));
}

at::Tensor checked(const at::Tensor& values, at::IntArrayRef sizes, const char* letters, const char* name,
                   at::ScalarType dtype) {
  TORCH_CHECK(values.sizes() == sizes, "quantize_weight: ", name, " must be ", letters, " = ", sizes, ", got ",
              values.sizes());
  TORCH_CHECK(values.is_floating_point(), "quantize_weight: ", name, " must be floating point, got ",
              values.scalar_type());
  const at::Tensor result = values.detach().to(dtype).contiguous();
  check_finite(result, name);
  return result;
}

at::Tensor checked_matrix(const at::Tensor& values, const at::Tensor& weight, const char* name) {
  const int64_t k = weight.size(1);
  return values.defined() ? checked(values, {k, k}, "[K, K]", name, weight.scalar_type()) : values;
}

at::Tensor checked_vector(const at::Tensor& values, const at::Tensor& weight, const char* name) {
  return values.defined() ? checked(values, {weight.size(1)}, "[K]", name, weight.scalar_type()) : values;
}

at::Tensor checked_hessian(const at::Tensor& hessian, const at::Tensor& weight, const char* name) {
  const at::Tensor values = checked_matrix(hessian, weight, name);
  if (!values.defined()) {
    return values;
  }
  const double difference = largest_asymmetry(values);
  const double largest = difference > 0 ? largest_size(values) : 0;
  TORCH_CHECK(difference <= kSymmetryTolerance * largest, "quantize_weight: ", name,
              " must be symmetric, got a difference of ", difference,
              " between H and its transpose; its largest entry is ", largest);
  const double least = values.diagonal().min().item<double>();
  TORCH_CHECK(least >= 0, "quantize_weight: ", name, " must be positive semidefinite, got ", least, " on its diagonal");
  return values;
}

// Where a weight is solved.
at::Device solver_device(const at::Tensor& weight) {
  return solved_on_device(weight) ? weight.device() : at::Device(at::kCPU);
}

// The same with every tensor that is known replaced by transform(tensor, its name).
template <typename Transform>
LayerStatistics transformed(const LayerStatistics& statistics, const Transform& transform) {
  const auto of = [&](const at::Tensor& values, const char* name) {
    return values.defined() ? transform(values, name) : values;
  };
  LayerStatistics result;
  result.hessian = of(statistics.hessian, "hessian");
  result.drift = of(statistics.drift, "drift");
  result.mean = of(statistics.mean, "mean");
  result.float_mean = of(statistics.float_mean, "float_mean");
  result.half_hessian = of(statistics.half_hessian, "half_hessian");
  result.half_drift = of(statistics.half_drift, "half_drift");
  result.nsamples = statistics.nsamples;
  return result;
}

}  // namespace

void check_finite(const at::Tensor& values, const char* name) {
  if (std::isfinite(largest_size(values))) {  // a NaN makes both ends NaN
    return;
  }
  const int64_t bad = values.numel() - values.isfinite().sum().item<int64_t>();
  TORCH_CHECK(bad == 0, "quantize_weight: ", name, " must be finite in ", values.scalar_type(), ", got ", bad,
              " NaN or Inf values of ", values.numel());
}

at::Tensor checked_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.defined() && weight.dim() == 2 && weight.numel() > 0,
              "quantize_weight: weight must be [N, K] with at least one row and one column, got ",
              weight.defined() ? weight.sizes() : at::IntArrayRef{});
  TORCH_CHECK(weight.is_floating_point(), "quantize_weight: weight must be floating point, got ", weight.scalar_type());
  TORCH_CHECK(weight.is_cpu() || weight.is_cuda() || solved_on_device(weight),
              "quantize_weight: weight must be on the CPU or a CUDA device, got ", weight.device());
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor values = weight.detach().to(solver_device(weight), dtype).contiguous();
  check_finite(values, "weight");
  return values;
}

LayerStatistics checked_statistics(const LayerStatistics& statistics, const at::Tensor& weight, const Plan& plan) {
  LayerStatistics result;
  result.nsamples = statistics.nsamples;
  result.hessian = checked_hessian(statistics.hessian, weight, "hessian");
  if (plan.target_alpha > 0) {
    result.drift = checked_matrix(statistics.drift, weight, "drift");
  }
  if (plan.correct_bias) {
    result.mean = checked_vector(statistics.mean, weight, "mean");
    result.float_mean = checked_vector(statistics.float_mean, weight, "float_mean");
  }
  if (plan.search_damping) {
    TORCH_CHECK(statistics.half_hessian.defined(),
                "quantize_weight: half_hessian is required to search the damping, got none");
    result.half_hessian = checked_hessian(statistics.half_hessian, weight, "half_hessian");
    result.half_drift =
        checked_matrix(result.drift.defined() ? statistics.half_drift : at::Tensor(), weight, "half_drift");
  }
  return result;
}

LayerStatistics centred(const LayerStatistics& statistics) {
  LayerStatistics result = statistics;
  const at::Tensor& mean = statistics.mean;
  const at::Tensor float_mean = statistics.float_mean.defined() ? statistics.float_mean : mean;
  result.hessian = statistics.hessian.sub(at::outer(mean, mean), 2);
  // Rounding may take the diagonal of a constant input below 0, which is dead without its mean.
  result.hessian.diagonal().clamp_min_(0);
  if (statistics.drift.defined()) {
    result.drift = statistics.drift.sub(at::outer(float_mean - mean, mean), 2);
  }
  return result;
}

LayerStatistics permuted(const LayerStatistics& statistics, const at::Tensor& order) {
  return transformed(statistics, [&](const at::Tensor& values, const char*) {
    const at::Tensor rows = values.index_select(0, order);
    return values.dim() == 1 ? rows : rows.index_select(1, order);
  });
}

LayerStatistics moved_to(at::Device solver, const LayerStatistics& statistics, at::Device device) {
  return transformed(statistics, [&](const at::Tensor& values, const char* name) {
    TORCH_CHECK(values.device() == device, "quantize_weight: ", name, " must be on the device of the weight, ", device,
                ", got ", values.device());
    return values.detach().to(solver);
  });
}

}  // namespace gptq
