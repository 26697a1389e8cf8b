#!/usr/bin/env python3
"""Write a randomly initialised GPT-2 with the real vocabulary, to measure time and memory where no hub can be reached.

    make_random_gpt2.py OUT_DIR [--layers 12 --width 768 --heads 12]

The defaults are GPT-2's own, 124 M parameters. Needs torch, transformers and openai-whisper (for the vocabulary).
"""

import argparse
from pathlib import Path

import torch
from gpt2_vocabulary import write_gpt2_vocabulary
from transformers import GPT2Config, GPT2LMHeadModel


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(GPT2Config(n_layer=args.layers, n_embd=args.width, n_head=args.heads))
    model.save_pretrained(args.out_dir)
    write_gpt2_vocabulary(args.out_dir)
    print(f"{args.out_dir}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
