#!/usr/bin/env python3
"""Compile a GPT-2 folder with AOTInductor into a package that the driver runs without Python.

    export_aoti.py FOLDER OUT.pt2 [--program OUT_PROGRAM.pt2]

FOLDER is what `gptq quantize` wrote, or a float model. The package takes input_ids, int64 [batch, length], any batch
size and length up to n_positions, and returns the logits, [batch, length, vocabulary]; `gptq eval OUT.pt2 --tokenizer
FOLDER --text FILE` scores a text with it. It holds machine code for the processor it is made on. --program writes the
exported program too, before it is compiled, for torch.export.load. Needs torch, transformers and a C++ compiler.
"""

import argparse
import os
import tempfile
from pathlib import Path

import gptq.huggingface  # noqa: F401, so that from_pretrained knows quantized folders
import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM


class Logits(torch.nn.Module):
    """A causal language model of transformers from ids to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def export(model):
    """Export a causal language model of transformers for any batch size and length up to its context.

    Returns:
        A torch.export.ExportedProgram from input_ids, int64 [batch, length], to logits [batch, length, vocabulary].
    """
    ids = torch.zeros(2, 8, dtype=torch.long)  # sizes that are no special case
    dims = {0: Dim("batch", min=1), 1: Dim("length", min=1, max=model.config.max_position_embeddings)}
    with torch.no_grad():
        return torch.export.export(Logits(model).eval(), (ids,), dynamic_shapes={"input_ids": dims})


def package(program, config, path, options=None):
    """Compile an exported program into an AOTInductor package, with what the driver wants to know beside it.

    Args:
        program: what export returned.
        config: of the model.
        path: to write to, ending in .pt2; appears complete or not at all.
        options: further settings of torch._inductor.config.
    """
    path = Path(path)
    metadata = {
        "torch_version": torch.__version__,
        "context_length": str(config.max_position_embeddings),
        "vocab_size": str(config.vocab_size),
    }
    settings = {
        "aot_inductor.metadata": metadata,
        "cpp.dynamic_threads": True,  # as many as the program that runs it says, not as there are here
        **(options or {}),
    }
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder, torch.no_grad():
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=os.path.join(folder, "model.pt2"), inductor_configs=settings
        )
        os.replace(made, path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="GPT-2 folder, quantized or float")
    parser.add_argument("out", type=Path, help="package to write, ending in .pt2")
    parser.add_argument("--program", type=Path, help="where to write the exported program too")
    args = parser.parse_args()
    if args.out.suffix != ".pt2":
        parser.error(f"OUT must end in .pt2, got {args.out}")
    if not (args.folder / "config.json").is_file():
        parser.error(f"{args.folder} must be a folder with config.json")
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    program = export(model)
    if args.program:
        torch.export.save(program, args.program)
    package(program, model.config, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
