"""Runs a model past a chain of blocks whose last output is known."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .calibration import copied, is_plain, map_tensors, tensors_in
from .trace import Stack, forward_of


class Touched(Exception):
    """The model reads what a block inside the chain gave."""


class _Unread(Tensor):
    """Stands for a tensor that nothing looks at; on the meta device, so that compiled code does not go on with it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        raise Touched


def check_read(*values: Any) -> None:
    """Raise Touched if the output of a block that was passed over, or what was made of it, is among the values."""
    if any(isinstance(tensor, _Unread) or tensor.is_meta for tensor in tensors_in(values)):
        raise Touched


class FinishedStack:
    """What the last block of a chain gave, and what kind of value the others give.

    Memory: the output of the last block for all calls, twice.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._kinds: list[Any] = []
        self._plain = True
        self._last: dict[bool, list[Any]] = {False: [], True: []}

    def note(self, index: int, output: Any, quantized: bool) -> None:
        """Note what a block gave: of each of the last block's outputs, and one of every other's."""
        self._plain = self._plain and is_plain(output)
        if index == len(self._stack.keys) - 1:
            self._last[quantized].append(output)
        elif index == len(self._kinds):
            unread = torch.empty(0, device="meta").as_subclass(_Unread)
            self._kinds.append(map_tensors(output, lambda tensor: unread))

    @contextmanager
    def passed_over(self, call: int, quantized: bool) -> Iterator[None]:
        """While the context lasts, the blocks compute nothing, and the last gives what it gave in a calibration call.

        Raises:
            Touched: at once, if blocks give other things than tensors; or from the model, where it does anything with
                the output of another block but to call the next one.
        """
        if not self._plain:
            raise Touched
        outputs = [*self._kinds, copied(self._last[quantized][call])]
        with ExitStack() as contexts:
            for block, output in zip(self._stack.blocks, outputs, strict=True):
                contexts.enter_context(forward_of(block, lambda *args, _output=output, **kwargs: _output))
            yield
