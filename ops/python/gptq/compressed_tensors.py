"""Models of transformers in the format "pack-quantized" of compressed-tensors, for vLLM and transformers.

Needs the package of that name, which transformers needs to load them.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor
from transformers import PreTrainedModel

from .quantized_linear import QuantizedConv2d, QuantizedLinear
from .targets import kind_of


class _Layout(NamedTuple):
    bits: int
    group_size: int  # -1: one group per row
    symmetric: bool


def save_pretrained(model: PreTrainedModel, folder: str | os.PathLike[str], **options: Any) -> None:
    """Write a model that gptq.quantize quantized, as model.save_pretrained does, but in this format.

    Codes, scales and zero points are those of the model, which stays as it is. The scales are float16: a reader that
    computes in bfloat16 rounds them. compute has no place in the format.

    Args:
        model: what was quantized, or what from_pretrained made of such a model. A head must have kept its weight, see
            lm_head="keep" of gptq.quantize.
        folder: what save_pretrained of transformers writes into.
        options: further arguments of save_pretrained, such as max_shard_size.

    Raises:
        ValueError: nothing in the model is quantized, or a layer that the format cannot hold: a head, a convolution,
            act_order="dynamic", or a group_size that does not divide the inputs. Nothing is written then.
    """
    modules = model.named_modules(remove_duplicate=False)  # state_dict has a shared layer under each of its names
    layers = {name: module for name, module in modules if isinstance(module, QuantizedLinear)}
    _check(model, layers)
    layouts = {name: _layout(layer) for name, layer in layers.items()}
    state = {key: tensor for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        state |= {f"{name}.{leaf}": tensor for leaf, tensor in _tensors(layer, layouts[name]).items()}
    dense = [name for name, module in model.named_modules() if kind_of(module) in ("Linear", "Conv1D")]
    with _described(model, _settings(layouts, dense)):
        model.save_pretrained(folder, state_dict=state, **options)


def _check(model: PreTrainedModel, layers: dict[str, QuantizedLinear]) -> None:
    if not layers:
        raise ValueError("model must have layers that gptq.quantize quantized, has none")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedConv2d):
            raise ValueError(f"{name} must not be quantized in the compressed-tensors format: it is a convolution")
    for name, layer in layers.items():
        if layer is model.get_output_embeddings():
            raise ValueError(f'{name} must keep its weight in the compressed-tensors format, see lm_head="keep"')
        if layer.input_order is not None:
            raise ValueError(f'{name}: act_order must not be "dynamic" in the compressed-tensors format')
        if layer.group_size != -1 and layer.in_features % layer.group_size:
            raise ValueError(
                f"{name}: group_size must be -1 or divide the {layer.in_features} inputs in the compressed-tensors "
                f"format, got {layer.group_size}"
            )


def _layout(layer: QuantizedLinear) -> _Layout:
    symmetric = layer.zeros is None or bool((layer.zeros == 2 ** (layer.bits - 1)).all())
    return _Layout(layer.bits, layer.group_size, symmetric)


def _tensors(layer: QuantizedLinear, layout: _Layout) -> dict[str, Tensor]:
    middle = 2 ** (layer.bits - 1)

    def signed(values: Tensor) -> Tensor:
        return (values.to(torch.int16) - middle).to(torch.int8)

    tensors = {
        "weight_packed": pack_to_int32(signed(layer.codes()), layer.bits),
        "weight_scale": layer.scales.t().contiguous(),
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if not layout.symmetric and layer.zeros is not None:
        tensors["weight_zero_point"] = pack_to_int32(signed(layer.zeros.t()), layer.bits, packed_dim=0)
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return tensors


def _settings(layouts: dict[str, _Layout], dense: list[str]) -> dict[str, Any]:
    """Return the quantization_config: the most frequent layout is that of every linear which is not named."""
    groups = {}
    for i, (layout, _) in enumerate(Counter(layouts.values()).most_common()):
        names = [name for name, each in layouts.items() if each == layout]
        weights = {"num_bits": layout.bits, "type": "int", "symmetric": layout.symmetric, "dynamic": False}
        width = {"strategy": "group", "group_size": layout.group_size}
        weights |= {"strategy": "channel", "group_size": None} if layout.group_size == -1 else width
        groups[f"group_{i}"] = {"targets": names if i else ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
    }


@contextmanager
def _described(model: PreTrainedModel, settings: dict[str, Any]) -> Iterator[None]:
    """Let save_pretrained take the model for one with these settings, and its own tensors for what to write."""
    config, quantizer = model.config.quantization_config, model.hf_quantizer
    model.config.quantization_config, model.hf_quantizer = settings, None
    try:
        yield
    finally:
        model.config.quantization_config, model.hf_quantizer = config, quantizer
