"""GPTQ post-training quantization and packed-INT4 inference for PyTorch.

Importing this package loads libgptq.so, which registers the ``gptq::`` operators and the class
``torch.classes.gptq.GPTQLayer``. The functions below call them and add nothing but names, types and documentation, so
``torch.ops.gptq.linear_w4`` and ``gptq.linear_w4`` are the same. Wrong arguments raise RuntimeError with a message that
names the argument, the requirement and the value received.

In the signatures x is the input [..., K], w the weight [N, K], G the group size in columns,
n_groups = ceil(K / G), and H the Hessian [K, K].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import load_library

__version__: str = load_library().get("version", "unknown")

__all__ = [
    "GPTQLayer",
    "QuantizedWeight",
    "dequantize_w4",
    "linear_w4",
    "pack_w4",
    "quantize_weight",
    "unpack_w4",
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
    rtn_relative_error of the layer's output; damping; damping_escalations; float64; dead_columns"""


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

    Returns:
        [..., N] in the input's dtype.
    """
    return torch.ops.gptq.linear_w4(input, packed, scales, zeros, bias, input_order, group_size, compute)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    per_tensor: bool = False,
    act_order: str = "auto",
    mode: str = "default",
    damping: float = 0.01,
    block_size: int = 128,
    drift: Tensor | None = None,
    target_alpha: float = 0.0,
) -> QuantizedWeight:
    """Quantize one weight by GPTQ, so that the error of the layer's output, tr(E H Eᵀ) with E = w - Q, is small.

    Args:
        weight: floating point [N, K]; not changed.
        hessian: floating point [K, K], symmetric positive semidefinite: 2 / n Σ x xᵀ over the layer's inputs, see
            GPTQLayer.
        bits: 2 to 8; only 4 can be packed.
        group_size: columns that share a scale and zero point, -1 for one group per row; the last group may be short.
        symmetric: fix the zero point at the middle code, 2**(bits - 1).
        per_tensor: one scale and zero point for the whole weight; group_size is then not used.
        act_order: "static" (columns by descending diagonal of H, groups as stored), "off" (columns as stored), or
            "auto": "static" in mode "default", "off" in mode "classic".
        mode: "default", "classic" (the published algorithm) or "rtn" (round to nearest).
        damping: added to the diagonal of H, as a share of the diagonal's mean.
        block_size: columns per block of the solver; changes speed only.
        drift: floating point [K, K], 2 / n Σ (x - x̂) x̂ᵀ, where the layer sees inputs x̂ behind quantized layers that are
            x in the float model, and hessian is that of x̂; mode "default" only.
        target_alpha: 0 to 1, how far w is moved against the drift before it is quantized.

    Returns:
        The codes, scales, zeros and a report.
    """
    return QuantizedWeight(
        *torch.ops.gptq.quantize_weight(
            *(weight, hessian, bits, group_size, symmetric, per_tensor, act_order, mode, damping, block_size),
            *(drift, target_alpha),
        )
    )


class GPTQLayer:
    """Gathers the Hessian of one linear layer from its inputs and quantizes its weight.

    The same as torch.classes.gptq.GPTQLayer, which TorchScript and C++ can use too.

    Args:
        weight: floating point [N, K], or [K, N] with conv1d, on the CPU; shared, not copied.
        bias: [N].
        conv1d: whether the weight is stored transposed, [K, N], as GPT-2's Conv1D does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, conv1d: bool = False) -> None:
        self._layer = torch.classes.gptq.GPTQLayer(weight, bias, conv1d)

    def add_batch(self, input: Tensor) -> None:
        """Add the vectors of an input, floating point [n, K] or [..., K], to the running Hessian."""
        self._layer.add_batch(input)

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
    ) -> QuantizedWeight:
        """Quantize the weight with the Hessian gathered so far.

        The arguments are those of quantize_weight, and write_back: whether to overwrite the layer's weight with the
        dequantized one, in its own dtype and orientation.
        """
        return QuantizedWeight(
            *self._layer.quantize(
                bits, group_size, symmetric, per_tensor, act_order, mode, damping, block_size, write_back
            )
        )

    def hessian(self) -> Tensor:
        """Return H = 2 / n Σ x xᵀ over the n input vectors seen, float32 [K, K]."""
        return self._layer.hessian()

    def nsamples(self) -> int:
        """Return the number of input vectors seen."""
        return self._layer.nsamples()
