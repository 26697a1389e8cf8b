// The schemas of every gptq:: operator, in one place. Each operator's file registers its own implementations.
#include <torch/library.h>

TORCH_LIBRARY(gptq, m) {
  m.def("pack_w4(Tensor codes) -> Tensor");
  m.def("unpack_w4(Tensor packed, int n, int k) -> Tensor");
  m.def("dequantize_w4(Tensor packed, Tensor scales, Tensor? zeros, int k, int group_size=0) -> Tensor");
  m.def(
      "linear_w4(Tensor input, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? input_order, "
      "int group_size, str compute=\"exact\") -> Tensor");
  m.def("pack_w8(Tensor codes) -> Tensor");
  m.def("unpack_w8(Tensor packed, int n, int k) -> Tensor");
  m.def("dequantize_w8(Tensor packed, Tensor scales, Tensor? zeros, int k, int group_size=0) -> Tensor");
  m.def(
      "linear_w8(Tensor input, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? input_order, "
      "int group_size, str compute=\"exact\") -> Tensor");
  m.def(
      "quantize_weight(Tensor weight, Tensor? hessian, int bits=4, int group_size=128, bool symmetric=True, "
      "bool per_tensor=False, str act_order=\"auto\", str mode=\"default\", float damping=0.01, "
      "int block_size=128, Tensor? drift=None, float target_alpha=1.0, str scale_search=\"auto\", int refine_sweeps=1, "
      "bool row_guard=True, bool correct_bias=False, bool search_damping=False, Tensor? mean=None, "
      "Tensor? float_mean=None, Tensor? half_hessian=None, Tensor? half_drift=None, bool compare=True) -> "
      "(Tensor codes, Tensor scales, Tensor zeros, Dict(str, float) report, Tensor? bias_shift, Tensor? input_order)");
}
