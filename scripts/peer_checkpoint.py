#!/usr/bin/env python3
"""Make and score checkpoints of the GPTQ format with the packages that others use.

    peer_checkpoint.py quantize MODEL OUT --text FILE [--bits 4] [--group-size 128] [--asymmetric] [--desc-act]
    peer_checkpoint.py score FOLDER --text FILE --json FILE [--loader gptqmodel] [--backend auto] [--max-tokens 2048]

tests/python/test_checkpoints.py runs it with the interpreter that GPTQ_PEER_PYTHON names, which needs torch and
gptqmodel; the loader `transformers` needs optimum too.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

import torch
import transformers

CALIBRATION_WINDOWS = 16


def read_ids(folder, text):
    """Return the token ids of a text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(Path(text).read_text(encoding="utf-8"), verbose=False)["input_ids"]


def quantize(args):
    """Quantize a float folder with gptqmodel."""
    from gptqmodel import GPTQModel, QuantizeConfig

    length = args.window
    ids = read_ids(args.model, args.text)[: CALIBRATION_WINDOWS * length]
    windows = [ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length)]
    config = QuantizeConfig(
        bits=args.bits,
        group_size=args.group_size,
        sym=not args.asymmetric,
        desc_act=args.desc_act,
        act_group_aware=False,  # needs groups, and no desc_act
        format=args.format,
    )
    model = GPTQModel.load(str(args.model), config, device="cpu")
    model.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows])
    model.save(str(args.out))


def load(args):
    """Return the model in float16, which the kernels of GPTQ checkpoints compute in."""
    if args.loader == "transformers":
        # transformers 5.23 asks every c_proj of a GPT-2 for its weight, which a quantized one has not; nothing is left
        # to initialize.
        transformers.GPT2PreTrainedModel._init_weights = lambda self, module: None
        return transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float16, device_map="cpu")
    from gptqmodel import BACKEND, GPTQModel

    backend = {"auto": BACKEND.AUTO, "torch": BACKEND.GPTQ_TORCH}[args.backend]
    return GPTQModel.load(str(args.folder), device="cpu", dtype=torch.float16, backend=backend).model


def quantized_layers(model):
    """Return the quantized linears by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}


def decompressed(args, model):
    """Return the float folder's architecture in float32, with the weights that the peer's own kernels dequantize."""
    config = transformers.AutoConfig.from_pretrained(args.folder)
    del config.quantization_config
    dense = transformers.GPT2LMHeadModel(config).float()
    floating = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    state = {name: tensor.float() for name, tensor in floating.items() if not name.endswith(".scales")}
    dense.load_state_dict(state, strict=False)
    for name, module in quantized_layers(model).items():
        dense.get_submodule(name).weight.data = module.dequantize_weight().float().contiguous()
    dense.tie_weights()
    return dense


@torch.no_grad()
def score(args):
    """Write the perplexity of the text's first tokens, in windows without overlap, as `gptq eval` counts it."""
    model = load(args)
    layers = quantized_layers(model)
    kernels = sorted({type(module).__name__ for module in layers.values()})
    if args.float32:
        model = decompressed(args, model)
    model.eval()
    ids = read_ids(args.folder, args.text)[: args.max_tokens]
    total, count = 0.0, 0
    for begin in range(0, len(ids), args.window):
        window = torch.tensor([ids[begin : begin + args.window]])
        if window.shape[1] < 2:
            continue
        logits = model(input_ids=window, attention_mask=torch.ones_like(window)).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    report = {
        "perplexity": math.exp(total / count),
        "tokens_scored": count,
        "kernels": kernels,
        "quantized": sorted(layers),
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("quantize", help=quantize.__doc__)
    making.set_defaults(run=quantize)
    making.add_argument("model", type=Path, help="float GPT-2 folder")
    making.add_argument("out", type=Path, help="folder to write")
    making.add_argument("--bits", type=int, default=4)
    making.add_argument("--group-size", type=int, default=128)
    making.add_argument("--asymmetric", action="store_true")
    making.add_argument("--desc-act", action="store_true")
    making.add_argument("--format", choices=("gptq", "gptq_v2"), default="gptq")
    scoring = commands.add_parser("score", help=score.__doc__)
    scoring.set_defaults(run=score)
    scoring.add_argument("folder", type=Path, help="quantized folder")
    scoring.add_argument("--json", type=Path, required=True, help="file to write")
    scoring.add_argument("--loader", choices=("gptqmodel", "transformers"), default="gptqmodel")
    scoring.add_argument("--backend", choices=("auto", "torch"), default="auto", help="gptqmodel's kernels")
    scoring.add_argument(
        "--float32", action="store_true", help="compute in float32 with the weights that the kernels dequantize"
    )
    scoring.add_argument("--max-tokens", type=int, default=2048)
    for command in (making, scoring):
        command.add_argument("--text", type=Path, required=True)
        command.add_argument("--window", type=int, default=256, help="tokens of a window")
    return parser.parse_args()


def main():
    args = parse_arguments()
    for name in ("model", "out", "folder", "json", "text"):
        if hasattr(args, name):
            setattr(args, name, getattr(args, name).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # gptqmodel leaves a folder of logs where it runs
        args.run(args)
        os.chdir("/")


if __name__ == "__main__":
    main()
