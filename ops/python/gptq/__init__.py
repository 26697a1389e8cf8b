"""GPTQ post-training quantization and packed-INT4 inference for PyTorch.

Importing this package loads libgptq.so, which registers the ``gptq::`` operators and the class
``torch.classes.gptq.GPTQLayer``. ``gptq.quantize`` quantizes a whole model with them. The functions below call them and
add nothing but names, types and documentation, so ``torch.ops.gptq.linear_w4`` and ``gptq.linear_w4`` are the same.
Wrong arguments raise RuntimeError with a message that names the argument, the requirement and the value received.

In the signatures x is the input [..., K], w the weight [N, K], G the group size in columns,
n_groups = ceil(K / G), and H the Hessian [K, K].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import load_library
from .quantize_model import quantize
from .quantized_linear import QuantizedConv2d, QuantizedLinear
from .report import LayerReport, QuantizationReport

__version__: str = load_library().get("version", "unknown")

__all__ = [
    "GPTQLayer",
    "LayerReport",
    "QuantizationReport",
    "QuantizedConv2d",
    "QuantizedLinear",
    "QuantizedWeight",
    "dequantize_w4",
    "dequantize_w8",
    "linear_w4",
    "linear_w8",
    "pack_w4",
    "pack_w8",
    "quantize",
    "quantize_weight",
    "unpack_w4",
    "unpack_w8",
]


class QuantizedWeight(NamedTuple):
    """A quantized weight: w ≈ (codes - zeros) * scales, with the scale and zero point of each code's group."""

    codes: Tensor
    """uint8 [N, K], values 0 to 2**bits - 1"""
    scales: Tensor
    """float16 [n_groups, N]"""
    zeros: Tensor
    """uint8 [n_groups, N]"""
    report: dict[str, float]
    """What happened: loss and rtn_loss, tr(E H Eᵀ) of this result and of round-to-nearest; relative_error and
    rtn_relative_error of the layer's output; sweep_loss, before refinement and row guard; damping;
    damping_escalations; float64; dead_columns; guarded_rows; too_few_samples"""
    bias_shift: Tensor | None = None
    """float32 [N] to add to the layer's bias, with correct_bias"""
    input_order: Tensor | None = None
    """int32 [K], with act_order="dynamic": column k of codes is column input_order[k] of the weight"""


def pack_w4(codes: Tensor) -> Tensor:
    """Pack 4-bit codes into the layout that linear_w4 reads.

    Args:
        codes: uint8 [N, K], every value in 0..15.

    Returns:
        uint8 [ceil(N / 16), ceil(K / 8), 64]; the same bytes on every machine.
    """
    return torch.ops.gptq.pack_w4(codes)


def unpack_w4(packed: Tensor, n: int, k: int) -> Tensor:
    """Return the codes of a packed weight, the inverse of pack_w4.

    Args:
        packed: uint8 [ceil(n / 16), ceil(k / 8), 64].
        n: rows of the weight.
        k: columns of the weight.

    Returns:
        uint8 [n, k].
    """
    return torch.ops.gptq.unpack_w4(packed, n, k)


def dequantize_w4(packed: Tensor, scales: Tensor, zeros: Tensor | None, k: int, group_size: int = 0) -> Tensor:
    """Return the float weight that a packed one stands for: (code - zero) * scale of its group.

    Args:
        packed: uint8 [ceil(N / 16), ceil(k / 8), 64], see pack_w4.
        scales: float16 [n_groups, N].
        zeros: uint8 [n_groups, N]; None means 8 everywhere.
        k: columns of the weight.
        group_size: columns per group, -1 for one group per row; 0 if all groups are equally wide.

    Returns:
        float32 [N, k].
    """
    return torch.ops.gptq.dequantize_w4(packed, scales, zeros, k, group_size)


def linear_w4(
    input: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    input_order: Tensor | None = None,
    *,
    group_size: int,
    compute: str = "exact",
) -> Tensor:
    """Compute x · dequantize_w4(packed, scales, zeros)ᵀ + bias from the packed weight.

    Args:
        input: float32, bfloat16 or float16 [..., K].
        packed: uint8 [ceil(N / 16), ceil(K / 8), 64], see pack_w4.
        scales: float16 [n_groups, N].
        zeros: uint8 [n_groups, N]; None means 8 everywhere.
        bias: floating point [N].
        input_order: int32 [K], for imported act-order checkpoints only: column k of the weight multiplies
            input[..., input_order[k]].
        group_size: columns per group, -1 for one group per row; the last group may be short.
        compute: "exact" (as accurate as the input's dtype), "bf16", or "int8" (input rounded to int8 per group).
            On CUDA, "bf16" multiplies 512 and more rows of 16-bit input by a weight rounded to that dtype, unless
            torch.use_deterministic_algorithms; everything else has the bits of the CPU.

    Returns:
        [..., N] in the input's dtype.
    """
    return torch.ops.gptq.linear_w4(input, packed, scales, zeros, bias, input_order, group_size, compute)


def pack_w8(codes: Tensor) -> Tensor:
    """Pack codes of 5 to 8 bits, uint8 [N, K], into the layout that linear_w8 reads.

    Returns:
        uint8 [ceil(N / 16), ceil(K / 8), 128]; the same bytes on every machine.
    """
    return torch.ops.gptq.pack_w8(codes)


def unpack_w8(packed: Tensor, n: int, k: int) -> Tensor:
    """Return the codes of a packed weight, uint8 [n, k], the inverse of pack_w8."""
    return torch.ops.gptq.unpack_w8(packed, n, k)


def dequantize_w8(packed: Tensor, scales: Tensor, zeros: Tensor | None, k: int, group_size: int = 0) -> Tensor:
    """As dequantize_w4, for a weight of pack_w8; zeros None means 128 everywhere."""
    return torch.ops.gptq.dequantize_w8(packed, scales, zeros, k, group_size)


def linear_w8(
    input: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    input_order: Tensor | None = None,
    *,
    group_size: int,
    compute: str = "exact",
) -> Tensor:
    """As linear_w4, for a weight of pack_w8; zeros None means 128 everywhere."""
    return torch.ops.gptq.linear_w8(input, packed, scales, zeros, bias, input_order, group_size, compute)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    per_tensor: bool = False,
    act_order: str = "auto",
    mode: str = "default",
    damping: float = 0.01,
    block_size: int = 128,
    drift: Tensor | None = None,
    target_alpha: float = 1.0,
    scale_search: str = "auto",
    refine_sweeps: int = 1,
    row_guard: bool = True,
    correct_bias: bool = False,
    search_damping: bool = False,
    mean: Tensor | None = None,
    float_mean: Tensor | None = None,
    half_hessian: Tensor | None = None,
    half_drift: Tensor | None = None,
    compare: bool = True,
) -> QuantizedWeight:
    """Quantize one weight by GPTQ, so that the error of the layer's output, tr(E H Eᵀ) with E = w - Q, is small.

    Below, x̂ are the layer's inputs, and x its inputs in the float model where earlier layers are quantized already.

    A weight on a CUDA device is quantized there, or by a library without CUDA kernels on the CPU.

    Args:
        weight: floating point [N, K] on the CPU or a CUDA device; not changed.
        hessian: floating point [K, K], symmetric positive semidefinite: 2 / n Σ x̂ x̂ᵀ, see GPTQLayer; None only in mode
            "rtn".
        bits: 2 to 8; only 4 can be packed.
        group_size: columns that share a scale and zero point, -1 for one group per row; the last group may be short.
        symmetric: fix the zero point at the middle code, 2**(bits - 1).
        per_tensor: one scale and zero point for the whole weight; group_size is then not used.
        act_order: "static" (columns by descending diagonal of H, groups as stored), "dynamic" (the same order, groups
            of columns that follow each other in it; see input_order), "off" (columns as stored), or "auto": "static"
            in mode "default", "off" in mode "classic".
        mode: "default", "classic" (the published algorithm) or "rtn" (round to nearest). The options below are for
            "default".
        damping: added to the diagonal of H, as a share of the diagonal's mean.
        block_size: columns per block of the solver; changes speed only.
        drift: floating point [K, K], 2 / n Σ (x - x̂) x̂ᵀ.
        target_alpha: 0 to 1, how far w is moved against the drift before it is quantized.
        scale_search: "minmax", "weighted" (scales, negative ones too, that make the error of each group small, weighted
            by what each column costs) or "auto": "weighted" in mode "default".
        refine_sweeps: passes of coordinate descent over codes and scales after the sweep.
        row_guard: round rows to nearest that came out worse than that.
        correct_bias: leave the mean error of the output to the bias, which has to be shifted by bias_shift; needs mean.
        search_damping: choose between 1, 3 and 10 times damping, and whether to refine, by the loss on half of the
            inputs when the other half is fitted; needs half_hessian.
        mean: floating point [K], the mean of x̂.
        float_mean: floating point [K], the mean of x, if it is another.
        half_hessian: floating point [K, K], the Hessian of half of the same inputs.
        half_drift: floating point [K, K], the drift of that half.
        compare: report rtn_loss and the relative errors, which cost about as much as the sweep; without it they are
            NaN.

    Returns:
        The codes, scales, zeros, a report, and bias_shift and input_order where they apply.
    """
    return QuantizedWeight(
        *torch.ops.gptq.quantize_weight(
            *(weight, hessian, bits, group_size, symmetric, per_tensor, act_order, mode, damping, block_size),
            *(drift, target_alpha, scale_search, refine_sweeps, row_guard, correct_bias, search_damping),
            *(mean, float_mean, half_hessian, half_drift, compare),
        )
    )


class GPTQLayer:
    """Gathers the Hessian of one linear layer from its inputs and quantizes its weight.

    The same as torch.classes.gptq.GPTQLayer, which TorchScript and C++ can use too.

    Args:
        weight: floating point [N, K], or [K, N] with conv1d, on the CPU or a CUDA device; shared, not copied.
        bias: [N].
        conv1d: whether the weight is stored transposed, [K, N], as GPT-2's Conv1D does.
        halves: whether the Hessian of half of the inputs is kept apart, which search_damping needs.
        drift: whether float inputs are gathered as the drift, which target_alpha needs; False: as their mean alone,
            which is enough for correct_bias.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        conv1d: bool = False,
        halves: bool = True,
        drift: bool = True,
    ) -> None:
        self._layer = torch.classes.gptq.GPTQLayer(weight, bias, conv1d, halves, drift)

    def add_batch(
        self,
        input: Tensor,
        float_input: Tensor | None = None,
        token_weights: Tensor | None = None,
        drop_nonfinite: bool = False,
    ) -> None:
        """Add the vectors of an input to the running Hessian.

        Args:
            input: floating point [n, K] or [..., K].
            float_input: the same inputs in the float model, where input comes from one whose earlier layers are
                quantized already. With every batch or none.
            token_weights: [...], at least 0: how much each vector counts, such as an attention mask.
            drop_nonfinite: drop and count vectors with NaN or Inf instead of raising.
        """
        self._layer.add_batch(input, float_input, token_weights, drop_nonfinite)

    def quantize(
        self,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        per_tensor: bool = False,
        act_order: str = "auto",
        mode: str = "default",
        damping: float = 0.01,
        block_size: int = 128,
        write_back: bool = False,
        target_alpha: float = 1.0,
        scale_search: str = "auto",
        refine_sweeps: int = 1,
        row_guard: bool = True,
        correct_bias: bool = False,
        search_damping: bool = False,
        min_samples: int = 1,
        compare: bool = True,
    ) -> QuantizedWeight:
        """Quantize the weight with what was gathered so far.

        The arguments are those of quantize_weight, and write_back: overwrite the layer's weight with the dequantized
        one, in its own dtype and orientation, and add bias_shift to its bias; min_samples: with fewer input vectors the
        weight is rounded to nearest, and the report says so.
        """
        return QuantizedWeight(
            *self._layer.quantize(
                *(bits, group_size, symmetric, per_tensor, act_order, mode, damping, block_size, write_back),
                *(target_alpha, scale_search, refine_sweeps, row_guard, correct_bias, search_damping, min_samples),
                compare,
            )
        )

    def hessian(self) -> Tensor:
        """Return H = 2 / n Σ x xᵀ over the n input vectors seen, float32 [K, K]."""
        return self._layer.hessian()

    def nsamples(self) -> int:
        """Return the number of input vectors seen."""
        return self._layer.nsamples()

    def dropped(self) -> int:
        """Return the number of input vectors left out for being NaN or Inf."""
        return self._layer.dropped()
