"""Float linears of the calibration's forward passes on the CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def _is_plain(*tensors: Tensor | None) -> bool:
    return all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu) for t in tensors)


class DenseLinears(TorchFunctionMode):
    """As a context: linear and addmm, which Conv1D calls, run as gptq::linear_dense. No gradients."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call gptq::linear_dense in place of func where that is the same."""
        if not kwargs and func is functional.linear and _is_plain(*args):
            return torch.ops.gptq.linear_dense(*args)
        if not kwargs and func is torch.addmm and _is_plain(*args) and [t.dim() for t in args] == [1, 2, 2]:
            bias, x, weight = args
            return torch.ops.gptq.linear_dense(x, weight.t(), bias)
        return func(*args, **(kwargs or {}))
