"""Runs a block again, up to a later layer, without computing again what does not change."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .calibration import is_plain, tensors_in
from .trace import forward_of

Key = tuple[tuple[str, int], ...]
"""A call: from the outermost module inside the block on, names and how many calls of that name went before it there"""


def free_bytes(device: torch.device) -> int:
    """Return how much memory is free, 0 if that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return 0
    import psutil

    return psutil.virtual_memory().available


@dataclass
class Room:
    """Memory for what is kept."""

    bytes: int


@dataclass
class _Kept:
    output: Any
    versions: list[int]
    """of the tensors in the output, which code that comes later may change in place"""
    bytes: int


def _versions(tensors: list[Tensor]) -> list[int]:
    """Return how often each tensor was changed in place."""
    return [tensor._version for tensor in tensors]


class Replay:
    """What the modules of one block gave in one calibration call, and what its attention gave, where there is room.

    An output is only kept if no pending module was called before, since all that comes behind one will change, and if
    the call changed none of its arguments, which its caller may rely on. Outputs inside a module are given up for that
    of the module itself.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._kept: dict[Key, _Kept] = {}

    @contextmanager
    def running(self, block: nn.Module, pending: Collection[nn.Module]) -> Iterator[None]:
        """While the context lasts, modules of the block give what is kept, and what they compute is kept.

        Args:
            block: the module that is called, with the same arguments as before.
            pending: modules that will be replaced by others, or have to be called.
        """
        run = _Run(self)
        with ExitStack() as contexts:
            for name, module in block.named_modules():
                if module is not block and not isinstance(module, torch.jit.ScriptModule):
                    forward = run.once(name, module.forward, module in pending)
                    contexts.enter_context(forward_of(module, forward))
            contexts.enter_context(run)
            yield

    def get(self, key: Key) -> _Kept | None:
        """Return what a call gave, if it is kept and still as it was."""
        kept = self._kept.get(key)
        if kept is not None and _versions(tensors_in(kept.output)) != kept.versions:
            self._forget(key)
            return None
        return kept

    def keep(self, key: Key, output: Any) -> None:
        """Keep what a call gave, if there is room."""
        if not is_plain(output):
            return
        tensors = tensors_in(output)
        size = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        if size > self._room.bytes:
            return
        for inner in [other for other in self._kept if other[: len(key)] == key]:
            self._forget(inner)
        self._room.bytes -= size
        self._kept[key] = _Kept(output, _versions(tensors), size)

    def clear(self) -> None:
        """Give up everything."""
        for key in list(self._kept):
            self._forget(key)

    def _forget(self, key: Key) -> None:
        self._room.bytes += self._kept.pop(key).bytes


@dataclass
class _Frame:
    key: Key = ()
    calls: dict[str, int] = field(default_factory=dict)


class _Run(TorchFunctionMode):
    """One forward of the block."""

    def __init__(self, replay: Replay) -> None:
        super().__init__()
        self._replay = replay
        self._frames = [_Frame()]
        self._final = True

    def once(self, name: str, compute: Callable[..., Any], pending: bool = False) -> Callable[..., Any]:
        """Return compute, but for calls whose output is kept."""

        def called(*args: Any, **kwargs: Any) -> Any:
            frame = self._frames[-1]
            number = frame.calls.get(name, 0)
            frame.calls[name] = number + 1
            key = (*frame.key, (name, number))
            kept = self._replay.get(key)
            if kept is not None:
                return kept.output
            self._final = self._final and not pending
            inputs = [t for t in tensors_in(args) + tensors_in(kwargs) if not t.is_inference()]
            versions = _versions(inputs)
            self._frames.append(_Frame(key))
            try:
                output = compute(*args, **kwargs)
            finally:
                self._frames.pop()
            if self._final and _versions(inputs) == versions:
                self._replay.keep(key, output)
            return output

        return called

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Keep the output of attention too, the one costly function that models call past their modules."""
        if func is functional.scaled_dot_product_attention:
            func = self.once(func.__name__, func)
        return func(*args, **(kwargs or {}))
