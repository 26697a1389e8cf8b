"""Reads the folders that the driver writes, `gptq quantize FOLDER -o OUT`, into transformers' models."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .quantized_linear import QuantizedLinear


def load_quantized(folder: str | os.PathLike[str]) -> nn.Module:
    """Load a GPT-2 folder that `gptq quantize` wrote as a model of transformers, with QuantizedLinear in it.

    Args:
        folder: config.json with a quantization_config of the quant_method "libgptq", and model.safetensors.

    Returns:
        A GPT2LMHeadModel in evaluation mode on the CPU; what is not quantized is in float32. Needs transformers and
        safetensors.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a folder of another kind, or tensors that are missing, too many, or of another shape or dtype than
            config.json asks for.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    method = settings.get("quant_method")
    if method != "libgptq":
        hint = ": `gptq convert --format libgptq` makes one" if method == "gptq" else ""
        raise ValueError(f"{folder}: quant_method in config.json must be 'libgptq', got {method!r}{hint}")
    state = load_file(folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name in sorted(key.removesuffix(".packed") for key in state if key.endswith(".packed")):
        _place(model, name, state, {**settings, **settings.get("modules", {}).get(name, {})})
    _fill(model, state, folder)
    return model


def _place(model: nn.Module, name: str, state: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Put a QuantizedLinear in the place of a linear of the model."""
    parent, _, leaf = name.rpartition(".")
    try:
        linear = model.get_submodule(name)
        outputs, inputs = linear.weight.shape if isinstance(linear, nn.Linear) else reversed(linear.weight.shape)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a linear of the model that config.json describes") from error
    bits = settings.get("bits", 4)
    scales = state.get(f"{name}.scales")
    if bits != 4 and scales is not None:  # None stands for 8, and the layer stores that only with 4 bits
        state.setdefault(f"{name}.zeros", torch.full_like(scales, 8, dtype=torch.uint8))
    layer = QuantizedLinear(
        *(inputs, outputs, bits, settings.get("group_size", 128), linear.bias is not None),
        zeros=f"{name}.zeros" in state,
        input_order=f"{name}.input_order" in state,
        dtype=torch.float32,
    )
    for leaf_name, buffer in layer.state_dict().items():
        stored = state.get(f"{name}.{leaf_name}")
        if leaf_name != "bias" and stored is not None and stored.dtype != buffer.dtype:
            raise ValueError(f"{name}.{leaf_name} must be {buffer.dtype}, got {stored.dtype}")
    setattr(model.get_submodule(parent), leaf, layer.eval())


def _fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a size mismatch, which torch explains
        raise ValueError(f"{folder}: {error}") from error
    tied = {"lm_head.weight"} if getattr(model.config, "tie_word_embeddings", True) else set()
    missing = sorted(set(missing) - tied)
    if missing or unexpected:
        raise ValueError(f"{folder}: tensors are missing: {missing}, or have no place in the model: {unexpected}")
