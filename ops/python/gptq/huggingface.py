"""Models of transformers: save_pretrained and from_pretrained.

``import gptq.huggingface`` tells transformers of the quantization method "libgptq", so that from_pretrained loads what
the driver or save_pretrained wrote. gptq.quantize imports it for a model of transformers, which save_pretrained can
then write; what it writes of a GPT-2 is a folder for the driver too.
"""

from collections.abc import Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .quantized_linear import QuantizedConv2d, QuantizedLinear

METHOD = "libgptq"
FORMAT = {"format": "w4", "version": 1}
OPTIONAL = ("zeros", "input_order")
DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.int32: "I32"}


@register_quantization_config(METHOD)
class LibgptqConfig(QuantizationConfigMixin):
    """The quantization_config of a model's config.json.

    Args:
        bits: of layers that modules does not name.
        group_size: of layers that modules does not name.
        modules: {path of the layer: {"bits": b, "group_size": g, "zeros": z, "input_order": o}}, the last two whether
            there are such tensors; left out: if the files have them.
        compute: of every layer, see gptq.linear_w4.
        settings: whatever else config.json says; kept.

    Raises:
        ValueError: another format or version than this library reads.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        modules: dict[str, dict[str, Any]] | None = None,
        compute: str = "exact",
        **settings: Any,
    ) -> None:
        for name, expected in FORMAT.items():
            if settings.get(name, expected) != expected:
                raise ValueError(f"quantization_config: {name} must be {expected!r}, got {settings[name]!r}")
        settings.pop("quant_method", None)
        self.quant_method = METHOD
        self.bits = bits
        self.group_size = group_size
        self.modules = modules or {}
        self.compute = compute
        for name, value in {**FORMAT, **settings}.items():
            setattr(self, name, value)

    def of(self, path: str) -> tuple[int, int]:
        """Return bits and group size of a layer."""
        settings = self.modules.get(path, {})
        return settings.get("bits", self.bits), settings.get("group_size", self.group_size)


@register_quantizer(METHOD)
class LibgptqQuantizer(HfQuantizer):
    """Puts QuantizedLinear where a checkpoint has packed weights. Used by from_pretrained."""

    requires_calibration = True  # gptq.quantize quantizes; from_pretrained does not

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        stored = _tensors(checkpoint_files)
        if not stored:
            raise ValueError("a model quantized by libgptq is loaded from safetensors files, got none")
        paths = {name.removesuffix(".packed") for name in stored if name.endswith(".packed")}
        for path in sorted(paths.union(self.quantization_config.modules)):
            _place(model, path, stored, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for path, module in model.named_modules():
            if not isinstance(module, QuantizedLinear):
                continue
            for leaf, tensor in module.state_dict(keep_vars=True).items():
                if not getattr(tensor, "_is_hf_initialized", False):
                    raise ValueError(f"{path}.{leaf} is missing in the checkpoint")
            # Not in the checkpoint, so that transformers made something up.
            module.unknown = torch.full((), float("nan"), dtype=model.dtype, device=module.packed.device)

    def is_serializable(self) -> bool:
        """Whether save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the weights can be trained: they cannot."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile works."""
        return True


def _tensors(files: Iterable[str] | None) -> dict[str, tuple[str, list[int]]]:
    """Return dtype, as safetensors calls it, and shape of each tensor by name."""
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files or ():
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    tensor = opened.get_slice(name)
                    found[name] = tensor.get_dtype(), tensor.get_shape()
    return found


def _find(model: PreTrainedModel, path: str) -> tuple[str, nn.Module] | None:
    """Return a layer of a checkpoint in the model: there or here the base model may be one level further in."""
    prefix = f"{model.base_model_prefix}."
    for name in (path, path.removeprefix(prefix), prefix + path):
        try:
            return name, model.get_submodule(name)
        except AttributeError:
            continue
    return None


def _place(model: PreTrainedModel, path: str, stored: dict[str, tuple[str, list[int]]], config: LibgptqConfig) -> None:
    # A convolution's weight is that of the linear in its QuantizedConv2d.
    found = _find(model, path) or _find(model, path.removesuffix(".linear"))
    if found is None:
        return  # as lm_head, of a model without a head; transformers tells what it did not use
    name, module = found
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() not in (2, 4):
        raise ValueError(f"{path} must be a linear or a convolution of the model, is {type(module).__name__}")
    conv1d = type(module).__name__ == "Conv1D"
    outputs, inputs = reversed(weight.shape) if conv1d else weight.flatten(1).shape
    bits, group_size = config.of(path)
    # transformers may store a layer under another name than it has in the model; then config.json says what there is.
    held = {**{leaf: f"{path}.{leaf}" in stored for leaf in OPTIONAL}, **config.modules.get(path, {})}
    layer: nn.Module = QuantizedLinear(
        *(inputs, outputs, bits, group_size, getattr(module, "bias", None) is not None),
        **{leaf: held[leaf] for leaf in OPTIONAL},
        compute=config.compute,
        device=weight.device,
        dtype=weight.dtype,
    )
    for leaf, tensor in layer.state_dict().items():
        expected = (DTYPES.get(tensor.dtype), list(tensor.shape))
        dtype, shape = stored.get(f"{path}.{leaf}", expected)
        if leaf != "bias" and (dtype, shape) != expected:
            raise ValueError(f"{path}.{leaf} must be {expected[0]} {expected[1]}, got {dtype} {shape}")
    if isinstance(module, nn.Conv2d):
        layer = QuantizedConv2d(layer, **QuantizedConv2d.geometry(module))
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, attribute, layer)
    if not [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]:
        # Nothing of its own to initialize. GPT-2's initialization of these modules would write to the layers' weights.
        parent._is_hf_initialized = True
    # A quantized lm_head is no longer tied to the embedding.
    model.all_tied_weights_keys.pop(f"{name}.weight", None)


def _settings(layer: QuantizedLinear) -> dict[str, int | bool]:
    held = {leaf: getattr(layer, leaf) is not None for leaf in OPTIONAL}
    return {"bits": layer.bits, "group_size": layer.group_size, **held}


def make_saveable(model: PreTrainedModel, **settings: Any) -> None:
    """Let save_pretrained write a model with QuantizedLinear in it. gptq.quantize does so.

    Args:
        model: its config gets a quantization_config, and the model an hf_quantizer.
        settings: further fields of the quantization_config, such as "sym".
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    modules = {name: _settings(layer) for name, layer in layers.items()}
    compute = next((layer.compute for layer in layers.values()), "exact")
    kinds = [(layer.bits, layer.group_size) for layer in layers.values()]
    bits, group_size = max(kinds, key=kinds.count, default=(4, 128))
    config = LibgptqConfig(bits, group_size, modules, compute, **settings)
    model.config.quantization_config = config
    model.hf_quantizer = LibgptqQuantizer(config)
    model.is_quantized = True
    model.quantization_method = METHOD
