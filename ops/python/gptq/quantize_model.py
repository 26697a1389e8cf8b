"""gptq.quantize: quantizes the layers of a PyTorch or transformers model in place."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Call, calls_of
from .dense_linear import DenseLinears
from .placement import NoPlacement, Placement, checked_device, placed
from .quantized_linear import QuantizedLinear
from .report import LayerReport, QuantizationReport, model_bytes
from .streams import InputStatistics, Replacements, Streams, replacement
from .targets import Grid, Target, find_targets, grid_chooser
from .trace import Trace, trace


class _Unpaired(Exception):
    """The two streams do not hold the same vectors, as behind a router."""


@dataclass
class _Gathered:
    """The inputs of one stage."""

    statistics: InputStatistics
    input_error: float = 0.0
    note: str = ""


def _weights_for(vectors: Tensor, token_weights: Tensor | None) -> Tensor | None:
    """Return token_weights in the shape of the vectors; None if they are not one per vector."""
    shape = vectors.shape[:-1]
    if token_weights is None or token_weights.numel() != shape.numel():
        return None
    return token_weights.reshape(shape)


class _Pass:
    """One run of gptq.quantize over the targets."""

    def __init__(
        self,
        model: nn.Module,
        calls: list[Call],
        options: dict[str, Any],
        drop_nonfinite: bool,
        compute: str,
        replacements: Replacements,
        placement: Placement | NoPlacement,
        report: QuantizationReport,
        progress: Callable[[str], None],
    ) -> None:
        self._model = model
        self._calls = calls
        self._options = options
        self._drop_nonfinite = drop_nonfinite
        self._compute = compute
        self._replacements = replacements
        self._placement = placement
        self._report = report
        self._progress = progress

    def run(self, targets: list[Target], blockwise: bool, activation_memory: int | None) -> None:
        """Quantize the targets in the order of execution, or without calls in the order of the model."""
        if not self._calls:
            self._finish(targets)
            return
        traced = trace(self._model, self._calls, targets, blockwise)
        streams = Streams(self._model, self._calls, traced, self._replacements, activation_memory)
        called = {target for stage in traced.stages for target in stage}
        for stage in traced.stages:
            start = time.perf_counter()
            streams.go_to(traced.units.get(stage[0]))
            self._placement.keep(module for target in stage for module in target.modules)
            gathered = self._gather(stage[0], streams, traced)
            for target in stage:
                self._quantize(target, gathered, start)
                start = time.perf_counter()
        self._finish([target for target in targets if target not in called])

    def _finish(self, targets: list[Target]) -> None:
        for target in targets:
            if self._options["mode"] == "rtn":
                start = time.perf_counter()
                self._placement.keep(target.modules)
                self._quantize(target, self._nothing_gathered(target), start)
            else:
                self._report.skipped[target.name] = "no calibration input reaches it"
                self._progress(target.name)

    def _nothing_gathered(self, target: Target) -> _Gathered:
        halves, drift = self._options["search_damping"], self._options["target_alpha"] > 0
        return _Gathered(InputStatistics(target.weight, self._drop_nonfinite, halves, drift))

    def _gather(self, target: Target, streams: Streams, traced: Trace) -> _Gathered:
        paired = self._options["mode"] == "default" and (
            self._options["target_alpha"] > 0 or self._options["correct_bias"]
        )
        try:
            return self._gather_inputs(target, streams, traced, paired)
        except _Unpaired:
            gathered = self._gather_inputs(target, streams, traced, None)
            gathered.note = "calibrated without the float model's inputs, which are of other tokens"
            return gathered

    def _gather_inputs(self, target: Target, streams: Streams, traced: Trace, paired: bool | None) -> _Gathered:
        """Gather what the model gives a target.

        Args:
            target: the first of its stage.
            streams: at its block.
            traced: says which calls reach it.
            paired: whether the float model's inputs are gathered too; None: not even compared.
        """
        gathered = self._nothing_gathered(target)
        difference = magnitude = 0.0
        for index, call in enumerate(self._calls):
            if traced.calls[target][index] == 0:
                continue
            found = streams.inputs(target, index, quantized=True)
            expected = found
            if len(self._replacements) > 0 and paired is not None:
                expected = streams.inputs(target, index, quantized=False)
            if [x.shape for x in found] != [x.shape for x in expected]:
                raise _Unpaired
            for got, wanted in zip(found, expected, strict=True):
                if got is not wanted:
                    difference += float(torch.linalg.vector_norm((got - wanted).float())) ** 2
                magnitude += float(torch.linalg.vector_norm(wanted.float())) ** 2
                self._add(target, gathered, call, got, wanted if paired else None)
        gathered.input_error = (difference / magnitude) ** 0.5 if magnitude > 0 else 0.0
        return gathered

    def _add(self, target: Target, gathered: _Gathered, call: Call, got: Tensor, wanted: Tensor | None) -> None:
        vectors = target.vectors(got)
        weights = None if target.kind == "Conv2d" else _weights_for(vectors, call.token_weights)
        if call.token_weights is not None and weights is None:
            gathered.note = "all its vectors count, since they are not one per token"
        with _naming(target):
            gathered.statistics.add(vectors, None if wanted is None else target.vectors(wanted), weights)

    def _quantize(self, target: Target, gathered: _Gathered, start: float) -> None:
        """Quantize the weight of a target, put it into the model, and report."""
        options = dict(self._options, bits=target.grid.bits, group_size=target.grid.group_size)
        options["correct_bias"] = options["correct_bias"] and target.bias is not None
        if gathered.statistics.nsamples == 0 and options["mode"] != "rtn":
            options["mode"] = "rtn"
            gathered.note = "rounded to nearest, since no token reaches it in the quantized model"
        weight = target.weight
        with _naming(target):
            codes, scales, zeros, found, shift, order = gathered.statistics.quantize(weight, **options)
            made: dict[nn.Module, nn.Module] = {}
            first: QuantizedLinear | None = None
            for module in target.modules:
                linear = self._linear(target, module, (codes, scales, zeros), shift, order)
                if first is not None:
                    for name in ("packed", "scales", "zeros", "input_order"):
                        setattr(linear, name, getattr(first, name))
                first = first or linear
                made[module] = replacement(module, target.kind, linear)
        self._replacements.add(target, made)
        self._placement.adopt(made)
        main = ("loss", "rtn_loss", "relative_error", "rtn_relative_error")
        self._report.layers.append(
            LayerReport(
                name=target.name,
                kind=target.kind,
                shape=(weight.shape[0], weight.shape[1]),
                bits=first.bits,
                group_size=first.group_size,
                nsamples=gathered.statistics.nsamples,
                dropped=gathered.statistics.dropped,
                **{name: found[name] for name in main},
                input_error=gathered.input_error,
                seconds=time.perf_counter() - start,
                bytes_before=weight.nbytes,
                bytes_after=first.nbytes(),
                note=gathered.note,
                details={name: value for name, value in found.items() if name not in main},
            )
        )
        self._progress(target.name)

    def _linear(
        self, target: Target, module: nn.Module, codes: tuple[Tensor, ...], shift: Tensor | None, order: Tensor | None
    ) -> QuantizedLinear:
        bias = None if module.bias is None else module.bias.detach().clone()
        if bias is not None and shift is not None:
            bias += shift.to(bias.dtype)
        return QuantizedLinear.from_codes(
            *(*codes, bias, order),
            bits=target.grid.bits,
            group_size=-1 if self._options["per_tensor"] else target.grid.group_size,
            compute=self._compute,
            dtype=module.weight.dtype,
        )


@contextmanager
def _naming(target: Target) -> Iterator[None]:
    """Name the layer in an error of the library."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{target.name}: {error}") from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and no cache of keys and values, for as long as the context lasts."""
    training = {module: module.training for module in model.modules()}
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    cached = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        with torch.inference_mode(False), torch.no_grad():
            model.eval()
            for one in cached:
                one.use_cache = False
            yield
    finally:
        for one in cached:
            one.use_cache = True
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _without_fast_path(model: nn.Module, targets: list[Target]) -> Iterator[None]:
    """Make nn.TransformerEncoder call its linears, and leave it so unless there is an error.

    In eval mode it otherwise reads their weights, which leaves nothing to observe, and nothing to read afterwards.
    """
    modules = {module for target in targets for module in target.modules}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer) and modules & {module.linear1, module.linear2}
    ]
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and set(layers) & set(m.layers)]
    settings = [(layer, "activation_relu_or_gelu", 0) for layer in layers]
    settings += [(encoder, "use_nested_tensor", False) for encoder in encoders]
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    try:
        yield
    except BaseException:
        for module, name, value in before:
            setattr(module, name, value)
        raise


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    if not shown:
        yield lambda name: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="quantizing", unit="layer") as bar:

        def done(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        yield done


def quantize(
    model: nn.Module,
    calibration: Iterable[Any] | None = None,
    bits: int = 4,
    group_size: int = 128,
    *,
    tokenizer: Callable[..., Any] | None = None,
    lm_head: str = "w8",
    skip: str | Iterable[str] | Callable[[str], bool] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    symmetric: bool = True,
    per_tensor: bool = False,
    act_order: str = "auto",
    mode: str = "default",
    damping: float = 0.01,
    block_size: int = 128,
    target_alpha: float = 1.0,
    scale_search: str = "auto",
    refine_sweeps: int = 1,
    row_guard: bool = True,
    correct_bias: bool = True,
    search_damping: bool = False,
    min_samples: int = 1,
    compare: bool = True,
    drop_nonfinite: bool = False,
    blockwise: bool = True,
    activation_memory: int | None = None,
    compute: str = "exact",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> QuantizationReport:
    """Quantize the linear layers of a model in place.

    nn.Linear and transformers' Conv1D become QuantizedLinear, nn.Conv2d becomes QuantizedConv2d. Layer by layer in the
    order of execution, each is calibrated on what the quantized layers before it give, and aims at what the float model
    gives. Layers that read the same tensor share their statistics. A module that stands at several places and weights
    that several modules share are quantized once. Embeddings stay as they are, those that share their weight with
    lm_head too.

    The model is run in eval mode without gradients, and its training flags are put back. If anything fails, or is
    interrupted, the model is left as it was. In nn.TransformerEncoderLayer the fast path, which reads weights past the
    modules, is turned off for good.

    Args:
        model: any module but a linear layer itself; on the CPU or a CUDA device, in float32, bfloat16 or float16.
        calibration: an iterable, such as a list or a DataLoader, of str (given to the tokenizer), tensors (the model's
            first argument), dicts (arguments by name) or tuples (arguments by position). A two-dimensional
            attention_mask in a dict leaves out padding; "token_weights" beside it, floating point [batch, tokens], says
            otherwise how much each token counts. A layer that is never called stays as it is. May be empty only in mode
            "rtn", where a layer whose weight the model reads without calling it must be skipped.
        bits: 2 to 8.
        group_size: columns that share a scale and zero point, -1 for one group per row.
        tokenizer: for calibration on text: called as tokenizer(text, return_tensors="pt").
        lm_head: what becomes of a layer of that name: "w8" (8 bits, one group per row), "w4" (as all others) or
            "keep".
        skip: regular expressions, found anywhere in the names of layers that stay as they are; or a function of the
            name.
        overrides: other settings for layers whose names match a regular expression: {regex: {"bits": b, "group_size":
            g, "skip": True}}, each of the three if wanted; the last one that says so counts.
        symmetric: this and all below that are not explained are those of gptq.quantize_weight and GPTQLayer.
        per_tensor: one scale for each whole weight.
        act_order: order of columns.
        mode: "default", "classic" or "rtn".
        damping: share of the diagonal's mean.
        block_size: changes speed only.
        target_alpha: how far a layer aims at the float model's output.
        scale_search: how scales are found.
        refine_sweeps: passes after the sweep.
        row_guard: keep the better of each row and the rounded one.
        correct_bias: let biases, where there are any, take the mean error of the outputs.
        search_damping: choose the damping by held-out inputs.
        min_samples: with fewer input vectors a weight is rounded to nearest, and the report says so.
        compare: report what rounding to nearest gives too.
        drop_nonfinite: leave out calibration vectors with NaN or Inf instead of stopping at them.
        blockwise: run a chain of blocks, such as the layers of a transformer, block by block, with the inputs of one
            block for all calibration calls in memory, twice. False: run the whole model up to each layer, which takes
            time that grows with the square of the depth.
        activation_memory: bytes, where the model computes, for what the modules of one block gave, so that the block
            does not start again for each of its layers; changes speed only. None: half of what is free when a block
            begins, which the limit of a container does not lower.
        compute: what the new layers hand to gptq.linear_w4.
        device: to work on, the CPU or a CUDA device, while the model stays where it is: a block at a time is copied
            there, quantized and brought back, and outside of chains of blocks a part that is called. The device holds
            the calibration set too, and with blockwise the inputs of one block for all calls, twice. Before that the
            model is run once on each calibration call, for which all of it is copied, part by part: few large calls
            cost less than many small ones. The model must compute where its inputs are. None: where the model is.
        progress: show a progress bar.

    Returns:
        What became of each layer; print shows a table.

    Raises:
        ValueError: no calibration where it is needed, or an argument out of range.
        TypeError: a kind of calibration that is not listed above, or a TorchScript model.
        RuntimeError: naming the layer, if its inputs or weight are not finite or the library refuses an option.
    """
    start = time.perf_counter()
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be a module of Python; the driver and gptq::quantize_module take TorchScript")
    if activation_memory is not None and (type(activation_memory) is not int or activation_memory < 0):
        raise ValueError(f"activation_memory must be a whole number of bytes or None, got {activation_memory!r}")
    worked_on = None if device is None else checked_device(device)
    choose = grid_chooser(Grid(bits, group_size), lm_head, skip, overrides)
    options = {
        "symmetric": symmetric,
        "per_tensor": per_tensor,
        "act_order": act_order,
        "mode": mode,
        "damping": damping,
        "block_size": block_size,
        "target_alpha": target_alpha,
        "scale_search": scale_search,
        "refine_sweeps": refine_sweeps,
        "row_guard": row_guard,
        "correct_bias": correct_bias,
        "search_damping": search_damping,
        "min_samples": min_samples,
        "compare": compare,
    }
    targets, skipped = find_targets(model, choose)
    report = QuantizationReport(skipped=skipped, bytes_before=model_bytes(model))
    replacements = Replacements()
    with ExitStack() as contexts:
        contexts.enter_context(_without_fast_path(model, targets))
        contexts.enter_context(_evaluating(model))
        contexts.enter_context(DenseLinears())
        placement = contexts.enter_context(placed(model, targets, worked_on))
        calls = calls_of(calibration, tokenizer, placement.device)
        if not calls and mode != "rtn":
            raise ValueError(f'calibration must hold at least one sample in mode "{mode}", got none')
        done = contexts.enter_context(_progress_bar(len(targets), progress))
        try:
            run = _Pass(model, calls, options, drop_nonfinite, compute, replacements, placement, report, done)
            run.run(targets, blockwise, activation_memory)
        except BaseException:
            replacements.take_back()
            raise
    replacements.restore_modes()
    transformers = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from .huggingface import make_saveable

        make_saveable(model, sym=symmetric, mode=mode, act_order=act_order, damping=damping, target_alpha=target_alpha)
    report.bytes_after = model_bytes(model)
    report.seconds = time.perf_counter() - start
    return report
