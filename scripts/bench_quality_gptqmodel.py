#!/usr/bin/env python3
"""Quantize a GPT-2 folder with gptqmodel and write what it gave as an ordinary float32 folder.

    bench_quality_gptqmodel.py MODEL OUT_DIR --windows WINDOWS.json --json REPORT.json

bench_quality.py runs this with the interpreter that has gptqmodel. The weights gptqmodel quantized come from the
checkpoint it saved; every other tensor is the float model's own, so that only the quantization is compared (gptqmodel
would keep them in bfloat16 on a CPU). Needs torch, safetensors and gptqmodel.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WORD_BITS = 32


def unpack_words(words, bits, count):
    """Unpack int32 words along dimension 0: a stream of `bits`-wide values, lowest bit first, as [count, columns]."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int64).view(1, -1, 1)
    stream = ((words.to(torch.int64).unsqueeze(1) >> shifts) & 1).flatten(0, 1)
    stream = stream[: count * bits].view(count, bits, -1)
    weights = (1 << torch.arange(bits, dtype=torch.int64)).view(1, -1, 1)
    return (stream * weights).sum(1)


def dequantize(tensors, bits, version):
    """Return the float32 weight [inputs, outputs] of one layer's qweight, qzeros, scales and g_idx.

    In version 1 of the format a zero point is stored less one, modulo 2^bits.
    """
    groups = tensors["g_idx"].long()
    scales = tensors["scales"].float()
    codes = unpack_words(tensors["qweight"], bits, groups.numel())
    zeros = unpack_words(tensors["qzeros"].T, bits, scales.shape[1]).T
    if version == 1:
        zeros = (zeros + 1) % 2**bits
    return (codes - zeros[groups]) * scales[groups]


def format_version(settings):
    name = settings.get("checkpoint_format", settings.get("format"))
    versions = {"gptq": 1, "gptq_v2": 2}
    if name not in versions:
        raise ValueError(f"quantize_config.json: the checkpoint format must be one of {sorted(versions)}, got {name}")
    return versions[name]


def read_checkpoint(folder):
    """Return the dequantized weight of each quantized layer of a GPTQ checkpoint, by name without `transformer.`."""
    settings = json.loads((folder / "quantize_config.json").read_text())
    version = format_version(settings)
    layers = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            layer, _, kind = name.removeprefix("transformer.").rpartition(".")
            layers.setdefault(layer, {})[kind] = tensor
    return {
        layer: dequantize(tensors, settings["bits"], version)
        for layer, tensors in layers.items()
        if "qweight" in tensors
    }


def replace_weights(source, weights, out_dir):
    """Write the float folder with these weights in place of its own; return each one's relative rms difference."""
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
    differences = {}
    for layer, weight in weights.items():
        name = f"{prefix}{layer}.weight"
        original = tensors[name]
        if weight.shape != original.shape:
            raise ValueError(f"{name}: must be {list(original.shape)}, got {list(weight.shape)}")
        differences[layer] = ((weight - original).norm() / original.norm()).item()
        if differences[layer] > 1:  # a transposed square weight would give 1.4
            raise ValueError(f"{name}: differs from the float weight by {differences[layer]:.0%}, so it was misread")
        tensors[name] = weight.contiguous()
    out_dir.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for path in source.iterdir():
        if path.suffix in (".json", ".txt") and path.name != "config.json":
            shutil.copy(path, out_dir)
    return differences


def quantize(args, folder):
    """Quantize and save with gptqmodel; return the seconds from the start of quantizing to the saved checkpoint."""
    from gptqmodel import GPTQModel, QuantizeConfig

    windows = json.loads(args.windows.read_text())
    calibration = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]
    options = {"dtype": getattr(torch, args.dtype)} if args.dtype else {}
    model = GPTQModel.load(
        str(args.model), QuantizeConfig(bits=args.bits, group_size=args.group_size), device="cpu", **options
    )
    start = time.perf_counter()
    model.quantize(calibration)
    model.save(str(folder))
    return time.perf_counter() - start


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="float GPT-2 folder")
    parser.add_argument("out_dir", type=Path, help="folder to write the dequantized model to")
    parser.add_argument("--windows", type=Path, required=True, help="JSON list of calibration windows of token ids")
    parser.add_argument("--json", type=Path, required=True, help="file to write the seconds and differences to")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="what to compute in (default: its own choice)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    args.model, args.windows, args.out_dir, args.json = (
        path.resolve() for path in (args.model, args.windows, args.out_dir, args.json)
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # gptqmodel leaves a folder of logs where it runs
        checkpoint = Path(scratch) / "checkpoint"
        seconds = quantize(args, checkpoint)
        weights = read_checkpoint(checkpoint)
    if not weights:
        raise SystemExit(f"{args.model}: gptqmodel quantized no layer")
    differences = replace_weights(args.model, weights, args.out_dir)
    args.json.write_text(json.dumps({"seconds": seconds, "weight_difference": differences}, indent=2) + "\n")


if __name__ == "__main__":
    main()
