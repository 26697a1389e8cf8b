"""Watches a float model run: which layers run when, what they read, and which blocks form chains."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .calibration import Call, copied, is_cache, tensors_in
from .targets import Target

Unit = tuple[int, int]
"""(stack, block) that a layer belongs to"""


class Stop(Exception):
    """Leaves a forward early, once all that was asked for is known."""


def argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a layer that was called with these arguments."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def pre_hooks(modules: Iterable[nn.Module], hook: Any) -> Iterator[None]:
    """Call hook(module, args, kwargs) before the forward of each module, for as long as the context lasts."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module have another forward for as long as the context lasts."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


@dataclass(eq=False)
class Stack:
    """A container whose modules, the blocks, are called one after the other, each with the output of the one before."""

    name: str
    container: nn.Module
    keys: list[str]
    """of the blocks in the container"""
    valid: bool = True
    place: int | str | None = None
    """of the argument that is the output of the block before"""
    hidden: list[Tensor] = field(default_factory=list)
    """for each calibration call, that argument of the first block"""
    calls: list[list[Call]] = field(default_factory=list)
    """for each calibration call, how each block is called; that argument is to be put in"""

    def block(self, index: int) -> nn.Module:
        """Return a block as it is now."""
        return self.container._modules[self.keys[index]]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks as they are now."""
        return [self.block(i) for i in range(len(self.keys))]


def find_stacks(model: nn.Module, targets: list[Target]) -> list[Stack]:
    """Return the lists of modules that may be chains of blocks, outer ones before those inside them."""
    modules = {module for target in targets for module in target.modules}
    stacks = []
    for name, container in model.named_modules():
        keys = [key for key, child in container._modules.items() if child is not None]
        holds = any(module in modules for module in container.modules())
        if isinstance(container, (nn.ModuleList, nn.Sequential)) and len(keys) > 1 and holds:
            stacks.append(Stack(name, container, keys))
    return stacks


class ChainWatch:
    """Records how the blocks of one stack are called, and finds out whether they form a chain.

    They do if each is called once and in order, if nothing of what the blocks before gave reaches a block but the
    output of the last, if nothing changes that on the way, and if they fill no cache of keys and values.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self._index = {block: i for i, block in enumerate(stack.blocks)}
        stack.valid = len(self._index) == len(stack.keys)
        self._reset()

    def _reset(self) -> None:
        self._calls: list[Call] = []
        self._first: Call | None = None
        self._outputs: list[Tensor] = []
        self._given: set[int] = set()
        self._last: tuple[Tensor, int] | None = None

    def before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note a call; a forward pre-hook."""
        position = len(self._calls)
        call = Call(args, dict(kwargs))
        cached = any(is_cache(call.get(place)) for place in call.places())
        if not self.stack.valid or self._index[block] != position or cached:
            self.stack.valid = False
        elif position == 0:
            self._given = {id(tensor) for tensor in tensors_in(args) + tensors_in(kwargs)}
            self._first = Call(copied(args), copied(kwargs))
        else:
            self._check(call)
        self._calls.append(call)

    def _check(self, call: Call) -> None:
        if self._last is None:
            self.stack.valid = False
            return
        last, version = self._last
        place = next((p for p in call.places() if call.get(p) is last), None)
        known = self.stack.place in (None, place)
        others = [t for p in call.places() if p != place for t in tensors_in(call.get(p))]
        given = {id(output) for output in self._outputs} - self._given
        self.stack.valid = (
            place is not None and known and last._version == version and not any(id(t) in given for t in others)
        )
        self.stack.place = place

    def after(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what a block gave; a forward hook."""
        found = tensors_in(output)
        self._outputs += found  # kept alive, so that no other tensor gets their ids
        self._last = (found[0], found[0]._version) if found else None

    def finish(self) -> None:
        """Take over what was recorded of one calibration call."""
        stack = self.stack
        stack.valid = stack.valid and len(self._calls) == len(stack.keys)
        first = self._first.get(stack.place) if stack.valid else None
        stack.valid = stack.valid and isinstance(first, Tensor)
        if stack.valid:
            calls = [call.replaced(stack.place, None) for call in self._calls]
            stack.calls.append([self._first.replaced(stack.place, None), *calls[1:]])
            stack.hidden.append(first)
        self._reset()


@dataclass
class Trace:
    """What was seen."""

    stages: list[list[Target]]
    """targets in the order of execution, those that read the same inputs together"""
    units: dict[Target, Unit]
    """the block that a target stands in; not in it: in none"""
    stacks: list[Stack]
    calls: dict[Target, list[int]]
    """how often a target was called in each calibration call"""


class _Watch:
    """Records the calls of the targets within one calibration call."""

    def __init__(self, targets: list[Target]) -> None:
        self._of_module = {module: target for target in targets for module in target.modules}
        self._seen: dict[tuple[Any, ...], tuple[Target, int]] = {}
        self._held: list[Tensor] = []
        self.sources: dict[Target, list[tuple[Target, int]]] = {}
        """for each target, in the order of last calls, which target read the input of each of its calls first"""

    @property
    def modules(self) -> list[nn.Module]:
        return list(self._of_module)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        target, x = self._of_module[module], argument(args, kwargs)
        self._held.append(x)  # kept alive, so that no other tensor gets its address
        place = (x.data_ptr(), x.numel(), x._version) if x.is_contiguous() else (id(x),)
        key = (*place, x.dtype, target.kind, *target.reads(), *(x.shape if target.kind == "Conv2d" else ()))
        sources = self.sources.pop(target, [])
        self.sources[target] = [*sources, self._seen.setdefault(key, (target, len(sources)))]


def _merge(order: list[Target], later: list[Target]) -> None:
    """Put those of later that are not yet in order behind the ones they follow."""
    known, position = set(order), 0
    for target in later:
        if target in known:
            position = max(position, order.index(target) + 1)
        else:
            order.insert(position, target)
            position += 1


def _drop_invalid(stacks: list[Stack], targets: list[Target], order: list[Target]) -> list[Stack]:
    """Return the outermost chains whose layers run one after the other and are used nowhere else."""
    accepted: list[Stack] = []
    for stack in stacks:
        inside = {module for block in stack.blocks for module in block.modules()}
        held = [target for target in targets if inside.intersection(target.modules)]
        places = [i for i, target in enumerate(order) if target in held]
        together = bool(places) and places[-1] - places[0] + 1 == len(places)
        homes = [[i for i, b in enumerate(stack.blocks) if set(b.modules()) & set(t.modules)] for t in held]
        whole = all(len(home) == 1 and inside.issuperset(t.modules) for home, t in zip(homes, held, strict=True))
        nested = any(stack.container in set(other.container.modules()) for other in accepted)
        if stack.valid and together and whole and not nested:
            accepted.append(stack)
    return accepted


def _units(stacks: list[Stack]) -> dict[nn.Module, Unit]:
    return {
        module: (s, b)
        for s, stack in enumerate(stacks)
        for b, block in enumerate(stack.blocks)
        for module in block.modules()
    }


def trace(model: nn.Module, calls: list[Call], targets: list[Target], blockwise: bool) -> Trace:
    """Run the float model on each calibration call and return what was seen.

    Memory: for each stack the input of its first block for all calls, and while a call runs, all inputs of layers.
    """
    stacks = find_stacks(model, targets) if blockwise else []
    chains = [ChainWatch(stack) for stack in stacks]
    order: list[Target] = []
    sources: dict[Target, list[tuple[Any, ...]]] = {target: [] for target in targets}
    for call in calls:
        watch = _Watch(targets)
        _run_watched(model, call, watch, [chain for chain in chains if chain.stack.valid])
        _merge(order, list(watch.sources))
        for target in targets:
            sources[target].append(tuple(watch.sources.get(target, ())))
    stacks = _drop_invalid(stacks, targets, order)
    home = _units(stacks)
    units = {target: home[target.modules[0]] for target in order if target.modules[0] in home}
    stages: dict[Any, list[Target]] = {}
    for target in order:
        stages.setdefault((units.get(target), tuple(sources[target])), []).append(target)
    counts = {target: [len(of_call) for of_call in sources[target]] for target in targets}
    return Trace(list(stages.values()), units, stacks, counts)


def _run_watched(model: nn.Module, call: Call, watch: _Watch, chains: list[ChainWatch]) -> None:
    handles = []
    try:
        for module in watch.modules:
            handles.append(module.register_forward_pre_hook(watch.before, with_kwargs=True))
        for chain in chains:
            for block in chain.stack.blocks:
                handles.append(block.register_forward_pre_hook(chain.before, with_kwargs=True))
                handles.append(block.register_forward_hook(chain.after))
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    for chain in chains:
        chain.finish()
