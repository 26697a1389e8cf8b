"""Works on a model part by part on a device while the model stays where it is."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .targets import Target
from .trace import find_stacks


@dataclass(eq=False)
class Part:
    """Modules that are on the device together: a block of a stack, or what stands outside of stacks."""

    roots: list[nn.Module]
    """one, and what has taken its place"""
    whole: bool
    """False: only the tensors of the root itself, since other parts are inside it"""
    holds: int = 0

    def tensors(self, roots: Iterable[nn.Module]) -> Iterator[Tensor]:
        """Yield the parameters and buffers of the part, as it is now, under these roots."""
        for root in roots:
            for module in root.modules() if self.whole else [root]:
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None:
                        yield tensor


@dataclass
class _Away:
    """A tensor that is on the device, what it held at home, and the parts that need it there."""

    tensor: Tensor
    home: Tensor
    parts: set[Part] = field(default_factory=set)


def find_parts(model: nn.Module, targets: list[Target]) -> list[Part]:
    """Return the parts of a model, which have no module in common."""
    containers = {stack.container for stack in find_stacks(model, targets)}
    parts: list[Part] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, whole: bool) -> None:
        if module in seen:
            return
        seen.add(module)
        whole = whole or containers.isdisjoint(module.modules())
        parts.append(Part([module], whole))
        if not whole:
            for child in module.children():
                visit(child, module in containers)

    visit(model, False)
    return parts


class Placement:
    """Keeps the tensors of a model at home but for those of the parts that run or are worked on.

    A part comes to the device when it is called, and goes home when it returns. Memory of the device: what is kept, and
    one part more.
    """

    def __init__(self, model: nn.Module, targets: list[Target], home: torch.device, device: torch.device) -> None:
        self.home = home
        self.device = device
        self._away: dict[int, _Away] = {}
        self._kept: list[Part] = []
        self._handles: list[Any] = []
        self._part_of: dict[nn.Module, Part] = {}
        for part in find_parts(model, targets):
            (root,) = part.roots
            for module in root.modules() if part.whole else [root]:
                self._part_of.setdefault(module, part)
            self._attach(part, root)

    def _attach(self, part: Part, root: nn.Module) -> None:
        def come(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._hold(part, [module])

        def go(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._release(part)

        self._handles.append(root.register_forward_pre_hook(come, prepend=True))
        self._handles.append(root.register_forward_hook(go, always_call=True))

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Keep the parts of these modules on the device from now on, and no others."""
        parts = list(dict.fromkeys(self._part_of[module] for module in modules))
        before, self._kept = self._kept, parts
        for part in before:
            if part not in parts:
                self._release(part)
        for part in parts:
            if part not in before:
                self._hold(part, part.roots)

    def adopt(self, made: dict[nn.Module, nn.Module]) -> None:
        """Take care of modules made[m] that were put in place of m; they have the hooks of m."""
        for old, new in made.items():
            part = self._part_of[new] = self._part_of[old]
            if old in part.roots:
                part.roots.append(new)

    def close(self) -> None:
        """Bring everything home and take no more care of the model."""
        self.keep([])
        for away in self._away.values():  # left behind by an interrupt
            away.tensor.data = away.home
        self._away.clear()
        for handle in self._handles:
            handle.remove()

    def _hold(self, part: Part, roots: Iterable[nn.Module]) -> None:
        part.holds += 1
        for tensor in part.tensors(roots):
            away = self._away.get(id(tensor))
            if away is None and (tensor.device != self.device or self.device == self.home):
                away = self._away[id(tensor)] = _Away(tensor, tensor.data)
                tensor.data = tensor.data.to(self.device, copy=True)
            if away is not None:
                away.parts.add(part)

    def _release(self, part: Part) -> None:
        part.holds -= 1
        if part.holds > 0:
            return
        for away in [away for away in self._away.values() if part in away.parts]:
            away.parts.remove(part)
            if not away.parts:
                away.tensor.data = away.home
                del self._away[id(away.tensor)]
        for tensor in part.tensors(part.roots):
            if id(tensor) not in self._away and tensor.device != self.home:
                tensor.data = tensor.data.to(self.home)  # made on the device


class NoPlacement:
    """Leaves a model alone that is worked on where it is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Do nothing."""

    def adopt(self, made: dict[nn.Module, nn.Module]) -> None:
        """Do nothing."""


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or else buffer; the CPU, if it has none."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def checked_device(device: torch.device | str | int) -> torch.device:
    """Return a device with its index.

    Raises:
        ValueError: it is neither the CPU nor a CUDA device that is there.
    """
    found = torch.device(device)
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ValueError(f"device must be the CPU or a CUDA device, got {str(device)!r}")
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"device must be one that is there, got {str(device)!r}, but torch sees no CUDA device")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= count:
        raise ValueError(f"device must be one of the {count} CUDA devices, got {str(device)!r}")
    return torch.device("cuda", index)


def is_elsewhere(home: torch.device, device: torch.device) -> bool:
    """Return whether a model has to be brought to the device."""
    return home != device


@contextmanager
def placed(model: nn.Module, targets: list[Target], device: torch.device | None) -> Iterator[Placement | NoPlacement]:
    """Work on a model on a device, for as long as the context lasts; None: where it is."""
    home = device_of(model)
    if device is None or not is_elsewhere(home, device):
        yield NoPlacement(home)
        return
    placement = Placement(model, targets, home, device)
    try:
        yield placement
    finally:
        placement.close()
