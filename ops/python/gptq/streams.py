"""The two streams of activations: the float model's, and those of the model whose earlier layers are quantized."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Call, tensors_in
from .finished_stack import FinishedStack, check_read
from .quantized_linear import QuantizedConv2d, QuantizedLinear
from .replay import Replay, Room, free_bytes
from .targets import Target
from .trace import Stack, Stop, Trace, Unit, argument, pre_hooks


class Replacements:
    """The modules put in place of others, which can be taken back."""

    def __init__(self) -> None:
        self._done: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []

    def __len__(self) -> int:
        return len(self._done)

    def add(self, target: Target, modules: dict[nn.Module, nn.Module]) -> None:
        """Put modules[m] in place of m wherever a module m of the target stands."""
        added = [(parent, name, old, modules[old]) for parent, name, old in target.places]
        self._done += added
        for parent, name, _, new in added:
            parent._modules[name] = new

    @property
    def replaced(self) -> set[nn.Module]:
        """The modules that were there before."""
        return {old for _, _, old, _ in self._done}

    def take_back(self) -> None:
        """Put all of the modules back that were there before."""
        for parent, name, old, _ in reversed(self._done):
            parent._modules[name] = old

    def restore_modes(self) -> None:
        """Put each new module in the mode, training or eval, of the one it replaces."""
        for _, _, old, new in self._done:
            new.train(old.training)

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """The float model, for as long as the context lasts."""
        self.take_back()
        try:
            yield
        finally:
            for parent, name, _, new in self._done:
                parent._modules[name] = new


class Streams:
    """Runs the model, or one block of it, on the calibration calls, as it was and as it is now.

    Memory: while a stack is passed, the inputs of one block for all calls, twice, and what is kept of its modules'
    outputs, at most activation_memory bytes; None: half of what is free when a block begins. Behind a stack the output
    of its last block for all calls, twice.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: list[Call],
        traced: Trace,
        replacements: Replacements,
        activation_memory: int | None,
    ) -> None:
        self._model = model
        self._calls = calls
        self._trace = traced
        self._replacements = replacements
        self._activation_memory = activation_memory
        self._observed = {module for stage in traced.stages for target in stage for module in target.modules}
        self._at: Unit | None = None
        self._hidden: dict[bool, list[Tensor]] = {}
        self._block_calls: dict[bool, list[list[Call]]] = {}
        self._replays: dict[bool, list[Replay]] = {}
        self._passed: FinishedStack | None = None
        self._finished: list[FinishedStack] = []

    def go_to(self, unit: Unit | None) -> None:
        """Bring both streams to the input of a block; None: the whole model."""
        if self._at is not None and (unit is None or unit[0] != self._at[0]):
            self._finish_stack()
        if unit is None:
            return
        if self._at is None:
            self._enter(unit[0])
        while self._at[1] < unit[1]:
            self._pass_block()

    def inputs(self, target: Target, call: int, quantized: bool) -> list[Tensor]:
        """Return what a target is called with in one calibration call.

        Args:
            target: one that is not replaced yet, in the block that was last gone to, or in none.
            call: index of the calibration call.
            quantized: of the model as it is now; False: of the float model.
        """
        expected = self._trace.calls[target][call]
        found: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = argument(args, kwargs)
            check_read(x)
            found.append(x.clone() if expected > 1 else x)
            if len(found) == expected:
                raise Stop

        unit = self._trace.units.get(target)
        with pre_hooks(target.modules, note), self._model_of(quantized), suppress(Stop):
            if unit is None:
                self._run_model(call, quantized, found)
            else:
                self._run_block(call, quantized)
        return found

    @contextmanager
    def _model_of(self, quantized: bool) -> Iterator[None]:
        if quantized:
            yield
        else:
            with self._replacements.taken_back():
                yield

    def _stack(self) -> Stack:
        return self._trace.stacks[self._at[0]]

    def _run_block(self, call: int, quantized: bool) -> Any:
        stack, index = self._stack(), self._at[1]
        prepared = self._block_calls[quantized][call][index].replaced(stack.place, self._hidden[quantized][call])
        block = stack.block(index)
        # In the float model too, so that no module is passed over inside of which a layer is to be observed.
        pending = self._observed - self._replacements.replaced
        with self._replays[quantized][call].running(block, pending):
            return prepared.run(block)

    def _run_model(self, call: int, quantized: bool, found: list[Any]) -> None:
        """Run the model, but for stacks that are finished; where it needs more of them, empty found and run it all."""
        if len(self._finished) > 0:
            try:
                with ExitStack() as contexts:
                    for stack in self._finished:
                        contexts.enter_context(stack.passed_over(call, quantized))
                    self._calls[call].run(self._model)
                    return
            except Stop:
                raise
            except Exception:  # Touched, or what code that torch does not see into makes of its arguments
                self._finished.clear()
                found.clear()
        self._calls[call].run(self._model)

    def _pass_block(self) -> None:
        """Bring both streams behind a block."""
        for quantized in (False, True):
            for call in range(len(self._calls)):
                with self._model_of(quantized):
                    output = self._run_block(call, quantized)
                self._hidden[quantized][call] = tensors_in(output)[0]
                self._passed.note(self._at[1], output, quantized)
                self._replays[quantized][call].clear()
        self._begin_block(self._at[0], self._at[1] + 1)

    def _finish_stack(self) -> None:
        stack = self._stack()
        while self._at[1] < len(stack.keys):
            self._pass_block()
        stack.hidden.clear()
        self._finished.append(self._passed)
        self._hidden.clear()
        self._at = None

    def _begin_block(self, number: int, index: int) -> None:
        self._at = (number, index)
        room = self._activation_memory
        if room is None:
            room = free_bytes(self._stack().hidden[0].device) // 2
        shared = Room(room)
        self._replays = {quantized: [Replay(shared) for _ in self._calls] for quantized in (False, True)}

    def _enter(self, number: int) -> None:
        self._begin_block(number, 0)
        stack = self._stack()
        self._passed = FinishedStack(stack)
        self._hidden[False] = stack.hidden
        self._block_calls[False] = stack.calls
        if len(self._replacements) == 0:
            self._hidden[True] = list(stack.hidden)
            self._block_calls[True] = stack.calls
            return
        recorded = [self._record(stack, call) for call in range(len(self._calls))]
        self._block_calls[True] = recorded
        self._hidden[True] = [calls[0].get(stack.place) for calls in recorded]

    def _record(self, stack: Stack, call: int) -> list[Call]:
        """Return how the model as it is now calls the blocks of a stack."""
        recorded: list[Call] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            check_read(args, kwargs)
            made = Call(args, dict(kwargs))
            if not recorded:
                made = made.replaced(stack.place, made.get(stack.place).clone())
            recorded.append(made if not recorded else made.replaced(stack.place, None))
            if len(recorded) == len(stack.keys):
                raise Stop

        with pre_hooks(stack.blocks, note), suppress(Stop):
            self._run_model(call, True, recorded)
        return recorded


class InputStatistics:
    """What layers that read the same inputs share: one GPTQLayer, which quantizes the weight of each in turn.

    Args:
        weight: of the first.
        drop_nonfinite: see GPTQLayer.add_batch.
        halves: see GPTQLayer.
        drift: see GPTQLayer.
    """

    def __init__(self, weight: Tensor, drop_nonfinite: bool, halves: bool, drift: bool) -> None:
        # GPTQLayer keeps this very tensor, so that its data can be exchanged; that there is a bias tells it to use the
        # mean, which correct_bias asks for.
        self._weight = weight.detach()
        bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
        self._layer = torch.classes.gptq.GPTQLayer(self._weight, bias, False, halves, drift)
        self._drop_nonfinite = drop_nonfinite

    def add(self, input: Tensor, float_input: Tensor | None, token_weights: Tensor | None) -> None:
        """Add input vectors, see GPTQLayer.add_batch."""
        self._layer.add_batch(input, float_input, token_weights, self._drop_nonfinite)

    def quantize(self, weight: Tensor, **options: Any) -> tuple[Any, ...]:
        """Quantize a weight that reads these inputs, see GPTQLayer.quantize."""
        self._weight.data = weight
        return self._layer.quantize(**options)

    @property
    def nsamples(self) -> int:
        """Input vectors seen."""
        return self._layer.nsamples()

    @property
    def dropped(self) -> int:
        """Input vectors left out for being NaN or Inf."""
        return self._layer.dropped()


def replacement(module: nn.Module, kind: str, linear: QuantizedLinear) -> nn.Module:
    """Return what takes the place of a module: linear, or a convolution with it, with the module's hooks and mode."""
    made = QuantizedConv2d(linear, **QuantizedConv2d.geometry(module)) if kind == "Conv2d" else linear
    for name in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
    ):
        setattr(made, name, getattr(module, name))  # the same dicts, so that handles of the hooks still remove them
    return made.train(module.training)
