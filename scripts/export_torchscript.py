#!/usr/bin/env python3
"""Write transformers' GPT-2 as a TorchScript file that takes any batch size and length up to n_positions.

    export_torchscript.py FOLDER OUT.pt [--dtype float32] [--freeze]
    export_torchscript.py --random OUT.pt [--layers 12 --width 768 --heads 12]

FOLDER holds config.json and model.safetensors. The module takes input_ids, int64 [batch, length], and returns the
logits, [batch, length, vocabulary]; `gptq quantize OUT.pt --tokenizer FOLDER ...` quantizes it. Needs torch and
transformers.
"""

import argparse
import warnings
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel


class Logits(torch.nn.Module):
    """A causal language model with its mask spelt out.

    transformers' own mask would be frozen to the length that is traced, as would any but its eager attention.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        length = input_ids.size(1)
        dtype = self.model.dtype
        masked = torch.full((length, length), torch.finfo(dtype).min, dtype=dtype, device=input_ids.device).triu(1)
        positions = torch.arange(length, device=input_ids.device)[None]
        return self.model(
            input_ids=input_ids,
            attention_mask=masked[None, None],
            position_ids=positions,
            use_cache=False,
            return_dict=False,
        )[0]


def trace(model):
    """Trace a GPT-2 of transformers, loaded with attn_implementation="eager"."""
    implementation = model.config._attn_implementation
    if implementation != "eager":
        raise ValueError(f"the model must have attn_implementation='eager', got {implementation!r}")
    example = torch.zeros(2, 2, dtype=torch.long)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to use torch.export
        return torch.jit.trace(Logits(model).eval(), example, check_trace=False)


def check(traced, model):
    """Compare with the model at another batch size and length."""
    limit = model.config.n_positions
    ids = torch.randint(model.config.vocab_size, (3, min(17, limit)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = model(ids).logits.float(), traced(ids).float()
    difference = float((got - expected).abs().max() / expected.abs().max())
    allowed = 64 * torch.finfo(model.dtype).eps  # the same operators; products may be blocked otherwise
    if not difference <= allowed:
        raise SystemExit(f"the traced module differs from the model by {difference:.2g} of the largest logit")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="Hugging Face GPT-2 folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--random", action="store_true", help="a freshly initialised model instead of a folder")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--freeze", action="store_true", help="make the weights constants of the graph")
    args = parser.parse_args()
    if (args.folder is None) != args.random:
        parser.error("either FOLDER or --random must be given")
    if args.random:
        torch.manual_seed(args.seed)
        config = GPT2Config(n_layer=args.layers, n_embd=args.width, n_head=args.heads, attn_implementation="eager")
        model = GPT2LMHeadModel(config)
    else:
        if not (args.folder / "config.json").is_file():
            parser.error(f"{args.folder} must be a folder with config.json")
        model = GPT2LMHeadModel.from_pretrained(args.folder, attn_implementation="eager")
    model = model.to(getattr(torch, args.dtype)).eval()
    traced = trace(model)
    check(traced, model)
    if args.freeze:
        traced = torch.jit.freeze(traced)
    partial = args.out.with_name(args.out.name + ".partial")
    torch.jit.save(traced, partial)
    partial.replace(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
