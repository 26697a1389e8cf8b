"""Finds the layers of a model that can be quantized, and says why others cannot."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .quantized_linear import QuantizedConv2d, unfold_image

LM_HEAD = r"(^|\.)lm_head$"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Grid:
    """How one layer is to be quantized."""

    bits: int
    group_size: int


@dataclass(eq=False)
class Target:
    """One weight to quantize, with the modules that use it and where they stand in the model."""

    name: str
    kind: str
    grid: Grid
    modules: list[nn.Module] = field(default_factory=list)
    places: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    """(parent, attribute, module)"""

    @property
    def weight(self) -> Tensor:
        """[N, K] view of the weight."""
        weight = self.modules[0].weight.detach()
        return weight.t() if self.kind == "Conv1D" else weight.flatten(1)

    @property
    def bias(self) -> Tensor | None:
        """The bias, where it belongs to this weight alone."""
        return self.modules[0].bias if len(self.modules) == 1 else None

    def vectors(self, input: Tensor) -> Tensor:
        """Return the input vectors, [..., K], of what the modules are called with."""
        if self.kind == "Conv2d":
            return unfold_image(input, QuantizedConv2d.geometry(self.modules[0]))
        return input

    def reads(self) -> tuple[Any, ...]:
        """Return what, beside the input itself, decides the input vectors."""
        if self.kind == "Conv2d":
            return tuple(QuantizedConv2d.geometry(self.modules[0]).values())
        return (self.weight.shape[1],)


def kind_of(module: nn.Module) -> str | None:
    """Return "Linear", "Conv1D" or "Conv2d"; None: another kind of module."""
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Conv2d):
        return "Conv2d"
    # Without an import of transformers: a model that has one has imported it.
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return "Conv1D"
    return None


def _obstacle(module: nn.Module, kind: str) -> str | None:
    """Return why a module cannot be quantized; None: it can."""
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads its weight without calling it"
    plain = {"Linear": nn.Linear, "Conv2d": nn.Conv2d}.get(kind)
    if plain is not None and type(module).forward is not plain.forward:
        return f"{type(module).__name__} has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return "its weight is no parameter of its own"
    if kind == "Conv2d" and module.groups != 1:
        return f"a convolution with groups={module.groups}"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


Choice = Callable[[str], Grid | str]


def grid_chooser(
    grid: Grid,
    lm_head: str,
    skip: str | Iterable[str] | Callable[[str], bool] | None,
    overrides: Mapping[str, Mapping[str, Any]] | None,
) -> Choice:
    """Return what decides, by a layer's name, on its grid or on why it stays as it is. See gptq.quantize.

    Raises:
        ValueError: an unknown lm_head or setting of an override, or a value out of range.
    """
    if lm_head not in ("w8", "w4", "keep"):
        raise ValueError(f'lm_head must be "w8", "w4" or "keep", got {lm_head!r}')
    overrides = dict(overrides or {})
    for pattern, settings in overrides.items():
        unknown = set(settings) - {"bits", "group_size", "skip"}
        if unknown:
            raise ValueError(f"overrides may set bits, group_size and skip, got {sorted(unknown)} for {pattern!r}")
    for settings in ({"bits": grid.bits, "group_size": grid.group_size}, *overrides.values()):
        if settings.get("bits", 4) not in range(2, 9):
            raise ValueError(f"bits must be in 2..8, got {settings['bits']}")
        if settings.get("group_size", -1) != -1 and settings["group_size"] < 1:
            raise ValueError(f"group_size must be -1 or at least 1, got {settings['group_size']}")
    if skip is None or isinstance(skip, str):
        skip = [skip] if skip else []
    patterns = [] if callable(skip) else [re.compile(pattern) for pattern in skip]

    def choose(name: str) -> Grid | str:
        is_head = re.search(LM_HEAD, name) is not None
        if callable(skip) and skip(name):
            return "skip"
        for pattern in patterns:
            if pattern.search(name):
                return f"skip {pattern.pattern!r}"
        if is_head and lm_head == "keep":
            return 'lm_head="keep"'
        settings = {"bits": grid.bits, "group_size": grid.group_size}
        if is_head and lm_head == "w8":
            settings = {"bits": 8, "group_size": -1}
        for pattern, override in overrides.items():
            if re.search(pattern, name):
                settings.update(override)
        if settings.pop("skip", False):
            return "an override"
        return Grid(**settings)

    return choose


def find_targets(model: nn.Module, choose: Choice) -> tuple[list[Target], dict[str, str]]:
    """Return the layers to quantize, in the order of the model's modules, and why others stay as they are.

    A module that stands at several places, and modules that share a weight, make one target.

    Raises:
        ValueError: the model itself is a layer, which cannot be replaced in place.
    """
    if kind_of(model) is not None:
        raise ValueError(f"model is itself a {kind_of(model)}, which cannot be replaced in place: wrap it in a module")
    targets: dict[int, Target] = {}
    skipped: dict[str, str] = {}
    parents = dict(model.named_modules(remove_duplicate=False))
    for name, module in parents.items():
        kind = kind_of(module)
        if kind is None:
            continue
        reason = _obstacle(module, kind)
        known = None if reason else targets.get(id(module.weight))
        grid = known.grid if known else choose(name)
        reason = reason or (grid if isinstance(grid, str) else None)
        if known and (known.kind != kind or known.reads() != Target("", kind, known.grid, [module]).reads()):
            reason = f"it reads the weight of {known.name} in another way"
        if reason:
            skipped[name] = reason
            continue
        target = known or targets.setdefault(id(module.weight), Target(name, kind, grid))
        if module not in target.modules:
            target.modules.append(module)
        parent, _, attribute = name.rpartition(".")
        target.places.append((parents[parent], attribute, module))
    return list(targets.values()), skipped
