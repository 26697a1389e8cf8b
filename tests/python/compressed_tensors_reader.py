"""What the package compressed-tensors makes of a folder, linear by linear."""

import json

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file

LEAVES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
PackQuantized = BaseCompressor.get_value_from_registry("pack-quantized")


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def package_scheme(settings, layer):
    """Return what the package takes the settings of a linear to be, None if it is left alone."""
    config = QuantizationConfig.model_validate(settings)
    linear = torch.nn.Linear(1, 1)
    if match_targets(layer, linear, config.ignore):
        return None
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    return schemes[match_targets(layer, linear, schemes)[0]]


def decompressed(folder):
    """Return the float32 weights [outputs, inputs] that the package makes of a folder."""
    tensors, settings = tensors_of(folder), settings_of(folder)
    weights = {}
    for name in tensors:
        layer = name.removesuffix(".weight_packed")
        if layer == name:
            continue
        stored = {leaf: tensors[f"{layer}.{leaf}"] for leaf in LEAVES if f"{layer}.{leaf}" in tensors}
        stored["weight_scale"] = stored["weight_scale"].float()  # it computes in the dtype of the scales
        weights[layer] = PackQuantized.decompress(stored, package_scheme(settings, layer))["weight"]
    return weights
