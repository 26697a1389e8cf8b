"""What gptq.quantize reports."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn


@dataclass
class LayerReport:
    """What became of one weight."""

    name: str
    """of the module; of the first of them where several share the weight"""
    kind: str
    """"Linear", "Conv1D" or "Conv2d\""""
    shape: tuple[int, int]
    """(N, K): outputs and inputs of each"""
    bits: int
    group_size: int
    """columns per group, -1: one group per row"""
    nsamples: int
    """calibration vectors seen; 0: rounded to nearest without any"""
    dropped: int
    """calibration vectors left out for being NaN or Inf"""
    loss: float
    """2 / n Σ |error of the output|², see gptq.quantize_weight"""
    rtn_loss: float
    """the same for rounding to nearest"""
    relative_error: float
    """of the layer's output: sqrt(loss / the loss of a weight of zeros)"""
    rtn_relative_error: float
    input_error: float
    """‖x̂ - x‖ / ‖x‖, inputs behind the quantized layers before against those of the float model"""
    seconds: float
    bytes_before: int
    bytes_after: int
    note: str = ""
    """anything out of the ordinary"""
    details: dict[str, float] = field(default_factory=dict)
    """the rest of the report of gptq.quantize_weight"""


@dataclass
class QuantizationReport:
    """What gptq.quantize did. print shows it as a table."""

    layers: list[LayerReport] = field(default_factory=list)
    """in the order in which they were quantized"""
    skipped: dict[str, str] = field(default_factory=dict)
    """names of the layers that stayed as they were, and why"""
    bytes_before: int = 0
    """of all parameters and buffers of the model, each counted once"""
    bytes_after: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dicts, lists, numbers and strings, fit for json."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("layer", "shape", "bits", "group", "error", "rtn error", "input error", "seconds")
        rows = [header, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines += [f"{layer.name}: {layer.note}" for layer in self.layers if layer.note]
        lines += [f"{name} stays as it was: {reason}" for name, reason in self.skipped.items()]
        ratio = f" ({self.bytes_before / self.bytes_after:.2f}x smaller)" if self.bytes_after else ""
        lines.append(
            f"{len(self.layers)} layers in {self.seconds:.1f} s; the model: {self.bytes_before / 1e6:.2f} MB before, "
            f"{self.bytes_after / 1e6:.2f} MB after{ratio}"
        )
        return "\n".join(lines)


def _row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.shape[0]} x {layer.shape[1]}",
        str(layer.bits),
        str(layer.group_size),
        f"{layer.relative_error:.3%}",
        f"{layer.rtn_relative_error:.3%}",
        f"{layer.input_error:.3%}",
        f"{layer.seconds:.2f}",
    )


def model_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a model; tensors that share memory count once."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not nn.parameter.is_lazy(t)]
    return sum({(t.data_ptr() or id(t)): t.nbytes for t in tensors}.values())
