"""The modules that take the place of quantized ones: QuantizedLinear and QuantizedConv2d.

Below, N is the number of output features (channels), K the number of inputs of each, G the group size in columns of the
weight and n_groups = ceil(K / G).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2..8, got {bits}")


class QuantizedLinear(nn.Module):
    """A linear layer with a packed weight of 2 to 8 bits: y = x · wᵀ + bias.

    Computed by gptq.linear_w4 for up to 4 bits, by gptq.linear_w8 for more. The constructor makes a layer of zeros with
    the shapes that load_state_dict needs, from_codes one that computes something. There is no gradient with respect to
    the input: backward raises, and torch.compile wants torch.no_grad().

    Moving and casting: everything follows ``.to(device)``; ``.to(dtype)``, ``.half()`` and the like cast the bias
    alone, the scales stay float16. Inputs may be float32, bfloat16 or float16 whatever the dtype of the bias; the
    output has the input's dtype.

    weight is there for code that asks for its dtype, device or shape: the values are NaN, see dequantize. A weight that
    is assigned, as transformers does to tie lm_head to the embedding, is ignored.

    Buffers, all of them in the state_dict unless None:
        packed: uint8 [ceil(N / 16), ceil(K / 8), 64], with more than 4 bits [ceil(N / 16), ceil(K / 8), 128].
        scales: float16 [n_groups, N].
        zeros: uint8 [n_groups, N]; None means the middle code everywhere, as symmetric weights of 4 and 8 bits have it.
        bias: floating point [N] or None.
        input_order: int32 [K] or None: column k of the weight multiplies x[..., input_order[k]].
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    input_order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 4,
        group_size: int = 128,
        bias: bool = True,
        *,
        zeros: bool | None = None,
        input_order: bool = False,
        compute: str = "exact",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a layer of zeros.

        Args:
            in_features: K.
            out_features: N.
            bits: 2 to 8.
            group_size: columns that share a scale and zero point; the last group may be short. -1, or at least K: one
                group per row.
            bias: whether there is one.
            zeros: whether zero points are stored; None: unless bits is 4 or 8. With other bits they always are.
            input_order: whether the inputs are gathered, see act_order="dynamic" of gptq.quantize_weight.
            compute: see gptq.linear_w4.
            device: of the buffers.
            dtype: of the bias and of weight; None: torch.get_default_dtype().

        Raises:
            ValueError: bits, group_size or a number of features out of range, or zeros=False with neither 4 nor 8 bits.
        """
        super().__init__()
        _check_bits(bits)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
        if group_size != -1 and group_size < 1:
            raise ValueError(f"group_size must be -1 or at least 1, got {group_size}")
        if zeros is None:
            zeros = bits not in (4, 8)
        if not zeros and bits not in (4, 8):
            raise ValueError(f"zeros may be left out only with 4 or 8 bits, got bits={bits}")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size if group_size < in_features else -1
        self.compute = compute
        self.wide = bits > 4
        groups = 1 if self.group_size == -1 else -(-in_features // self.group_size)

        def empty(shape: tuple[int, ...], kind: torch.dtype | None) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        grid = (groups, out_features)
        buffers = {
            "packed": empty((-(-out_features // 16), -(-in_features // 8), 128 if self.wide else 64), torch.uint8),
            "scales": empty(grid, torch.float16),
            "zeros": empty(grid, torch.uint8) if zeros else None,
            "bias": empty((out_features,), dtype) if bias else None,
            "input_order": empty((in_features,), torch.int32) if input_order else None,
            "unknown": empty((), dtype).fill_(float("nan")),
        }
        # torch.export counts its inputs wrongly where a buffer follows one that is None.
        for name in sorted(buffers, key=lambda name: buffers[name] is None):
            self.register_buffer(name, buffers[name], persistent=name != "unknown")

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        input_order: Tensor | None = None,
        *,
        bits: int = 4,
        group_size: int = 128,
        compute: str = "exact",
        dtype: torch.dtype | None = None,
    ) -> "QuantizedLinear":
        """Make a layer of what gptq.quantize_weight returns.

        Args:
            codes: uint8 [N, K], 0 to 2**bits - 1.
            scales: float16 [n_groups, N].
            zeros: uint8 [n_groups, N]; None: the middle code, 2**(bits - 1).
            bias: floating point [N].
            input_order: int32 [K]: column k of codes is column input_order[k] of the weight.
            bits: 2 to 8.
            group_size: columns per group, -1 for one group per row.
            compute: see gptq.linear_w4.
            dtype: of weight; None: that of the bias, or torch.get_default_dtype() without one.

        Returns:
            A layer on the device of codes. codes are copied, the other tensors are not.

        Raises:
            ValueError: a shape, a dtype or a code that does not fit.
            RuntimeError: codes are not uint8.
        """
        _check_bits(bits)
        n, k = codes.shape
        middle = 2 ** (bits - 1)
        if zeros is not None and bits in (4, 8) and bool((zeros == middle).all()):
            zeros = None
        elif zeros is None and bits not in (4, 8):
            zeros = torch.full_like(scales, middle, dtype=torch.uint8)
        layer = cls(
            *(k, n, bits, group_size, bias is not None),
            zeros=zeros is not None,
            input_order=input_order is not None,
            compute=compute,
            device="meta",
        )
        layer._fill(codes, scales, zeros, bias, input_order)
        if dtype is None:
            dtype = torch.get_default_dtype() if bias is None else bias.dtype
        layer.unknown = torch.full((), float("nan"), dtype=dtype, device=codes.device)
        return layer

    def _fill(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, input_order: Tensor | None
    ) -> None:
        if codes.numel() and int(codes.max()) >= 2**self.bits:
            raise ValueError(f"codes must be below 2**bits = {2**self.bits}, got {int(codes.max())}")
        packed = torch.ops.gptq.pack_w8(codes) if self.wide else torch.ops.gptq.pack_w4(codes)
        made = {"packed": packed, "scales": scales, "zeros": zeros, "bias": bias}
        for name, tensor in {**made, "input_order": input_order}.items():
            expected = getattr(self, name)
            if tensor is not None and tensor.shape != expected.shape:
                raise ValueError(f"{name} must be {list(expected.shape)}, got {list(tensor.shape)}")
            if tensor is not None and name != "bias" and tensor.dtype != expected.dtype:
                raise ValueError(f"{name} must be {expected.dtype}, got {tensor.dtype}")
            setattr(self, name, tensor if tensor is None else tensor.detach())

    @property
    def weight(self) -> Tensor:
        """NaN [N, K], with a dtype and a device; takes no memory."""
        return self.unknown.expand(self.out_features, self.in_features)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Ignore a weight; register any other parameter."""
        if name != "weight":
            super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer: [..., K] to [..., N] in the input's dtype."""
        if self.wide:
            return torch.ops.gptq.linear_w8(
                input, self.packed, self.scales, self.zeros, self.bias, self.input_order, self.group_size, self.compute
            )
        return torch.ops.gptq.linear_w4(
            input, self.packed, self.scales, self.zeros, self.bias, self.input_order, self.group_size, self.compute
        )

    def codes(self) -> Tensor:
        """Return the codes, uint8 [N, K], columns as they are stored."""
        unpack = torch.ops.gptq.unpack_w8 if self.wide else torch.ops.gptq.unpack_w4
        return unpack(self.packed, self.out_features, self.in_features)

    def dequantize(self) -> Tensor:
        """Return the float weight that the packed one stands for, float32 [N, K], columns in the order of the input."""
        dequantize = torch.ops.gptq.dequantize_w8 if self.wide else torch.ops.gptq.dequantize_w4
        weight = dequantize(self.packed, self.scales, self.zeros, self.in_features, self.group_size)
        if self.input_order is None:
            return weight
        result = torch.empty_like(weight)
        result[:, self.input_order.long()] = weight
        return result

    def nbytes(self) -> int:
        """Return the bytes of packed, scales, zeros and input_order: of everything but the bias."""
        return sum(t.nbytes for t in (self.packed, self.scales, self.zeros, self.input_order) if t is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float16:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """Describe the layer for print."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


class QuantizedConv2d(nn.Module):
    """A two-dimensional convolution with a packed weight: torch.nn.functional.unfold, then a QuantizedLinear.

    The weight [N, C, height, width] is one of N rows and K = C · height · width columns, and each position of the
    output has one input vector. With a stride of 1 the unfolded input takes height · width times the input's memory.

    Args:
        linear: a layer with K = in_channels · height · width.
        in_channels: C.
        kernel_size: (height, width).
        stride: (rows, columns).
        padding: (left, right, top, bottom), as torch.nn.functional.pad takes it.
        dilation: (rows, columns).
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Raises:
        ValueError: linear has another number of inputs.
    """

    def __init__(
        self,
        linear: QuantizedLinear,
        in_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        columns = in_channels * kernel_size[0] * kernel_size[1]
        if linear.in_features != columns:
            raise ValueError(f"linear must have {columns} inputs, got {linear.in_features}")
        self.linear = linear
        self.in_channels = in_channels
        self.out_channels = linear.out_features
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.padding_mode = padding_mode

    @property
    def weight(self) -> Tensor:
        """NaN [N, C, height, width], see QuantizedLinear."""
        return self.linear.unknown.expand(self.out_channels, self.in_channels, self.kernel_size[0], self.kernel_size[1])

    @staticmethod
    def geometry(module: nn.Conv2d) -> dict[str, Any]:
        """Return the arguments of this class, but for linear, that make the same convolution as module."""
        return {
            "in_channels": module.in_channels,
            "kernel_size": tuple(module.kernel_size),
            "stride": tuple(module.stride),
            "padding": tuple(module._reversed_padding_repeated_twice),
            "dilation": tuple(module.dilation),
            "padding_mode": module.padding_mode,
        }

    def forward(self, input: Tensor) -> Tensor:
        """Compute the convolution: [B, C, H, W] or [C, H, W] to [B, N, H', W'] or [N, H', W']."""
        batched = input if input.dim() == 4 else input.unsqueeze(0)
        padded = pad_image(batched, self.padding, self.padding_mode)
        height, width = (
            (padded.shape[2 + i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        columns = functional.unfold(padded, self.kernel_size, self.dilation, 0, self.stride)
        y = self.linear(columns.transpose(1, 2)).transpose(1, 2)
        y = y.reshape(batched.shape[0], self.out_channels, height, width)
        return y if input.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        """Describe the layer for print."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, padding_mode={self.padding_mode}"
        )


def pad_image(image: Tensor, padding: tuple[int, int, int, int], padding_mode: str) -> Tensor:
    """Pad [B, C, H, W] by (left, right, top, bottom) in the way that nn.Conv2d names padding_mode."""
    if not any(padding):
        return image
    return functional.pad(image, padding, mode="constant" if padding_mode == "zeros" else padding_mode)


def unfold_image(image: Tensor, geometry: dict[str, Any]) -> Tensor:
    """Return the input vectors of a convolution, [B, positions, K], see QuantizedConv2d.geometry."""
    batched = image if image.dim() == 4 else image.unsqueeze(0)
    padded = pad_image(batched, geometry["padding"], geometry["padding_mode"])
    return functional.unfold(padded, geometry["kernel_size"], geometry["dilation"], 0, geometry["stride"]).transpose(
        1, 2
    )
