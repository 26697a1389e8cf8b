#!/usr/bin/env python3
"""Train a small GPT-2 on the text of the Python installation and write it as a Hugging Face folder.

    train_demo_model.py OUT_DIR --minutes 20

--minutes counts processor time divided by the number of threads, so that a busy machine trains as long as an idle one.

The text comes from gather_text.py, the tokenizer is byte-level BPE trained on the same text, and the
folder holds config.json, model.safetensors (float16), vocab.json, merges.txt, tokenizer.json,
tokenizer_config.json and README.md. Needs torch, transformers, tokenizers and safetensors.
"""

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path

import torch
from gather_text import HELD_OUT_SHARE, gather
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

END_OF_TEXT = "<|endoftext|>"

MODEL_CARD = """---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# A small GPT-2 trained on the Python standard library

The demo and test model of libgptq: GPT-2 architecture, {parameters:,} parameters ({layers} layers, width {width},
{heads} heads, {positions} positions, {vocabulary} tokens). `scripts/train_demo_model.py` trained it from scratch for
{minutes:.0f} minutes on {threads} CPU cores ({steps} steps of {batch_tokens} tokens, {epochs:.2f} passes) on the
sources and documentation of Python {python}'s standard library; one file in {share} was held out. Held-out perplexity
at the end, on non-overlapping windows of {positions} tokens: {perplexity:.3f} ({scored} tokens scored).

It knows how Python code looks and nothing else. It is there so that perplexity, KL divergence and generated text
mean something where no hub can be reached.
"""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--text", type=Path, help="folder with train.txt and heldout.txt (default: gathered anew)")
    parser.add_argument("--minutes", type=float, default=20.0, help="training time on the cores")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="windows a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(text_dir, out_dir, vocabulary):
    """Train byte-level BPE on train.txt, write its files and return the tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(text_dir / "train.txt")], vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False)
    bpe.save_model(str(out_dir))
    bpe.save(str(out_dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return Tokenizer.from_file(str(out_dir / "tokenizer.json"))


def make_model(args):
    config = GPT2Config(
        vocab_size=args.vocabulary,
        n_positions=args.positions,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def learning_rate_at(progress, peak):
    """Linear warm-up over the first 3 % of the time, then a cosine down to 2 % of the peak."""
    if progress < 0.03:
        return peak * progress / 0.03
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.03) / 0.97)))


@torch.no_grad()
def heldout_perplexity(model, ids, window):
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        chunk = ids[start : start + window].unsqueeze(0)
        if chunk.shape[1] < 2:
            break
        loss = model(chunk, labels=chunk).loss.item()
        total += loss * (chunk.shape[1] - 1)
        count += chunk.shape[1] - 1
    return math.exp(total / count), count


def train(model, ids, args):
    """Train for args.minutes on random windows and return the number of steps."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(args.seed)
    budget = 60 * args.minutes * torch.get_num_threads()
    started, step = time.process_time(), 0
    while (progress := (time.process_time() - started) / budget) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(progress, args.learning_rate)
        starts = torch.randint(len(ids) - args.positions - 1, (args.batch,), generator=generator)
        batch = torch.stack([ids[s : s + args.positions] for s in starts])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            print(f"step {step}  {progress:6.1%}  loss {loss.item():.4f}", flush=True)
    return step


def save(model, out_dir):
    """Write config.json and the weights in float16, without the buffers that hold no parameters."""
    tensors = {
        name.removeprefix("transformer."): value.to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    save_file(tensors, str(out_dir / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config["architectures"] = ["GPT2LMHeadModel"]
    config["dtype"] = "float16"
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main():
    args = parse_arguments()
    torch.manual_seed(args.seed)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        text_dir = args.text or Path(scratch)
        if not args.text:
            gather(text_dir)
        tokenizer = train_tokenizer(text_dir, args.out_dir, args.vocabulary)
        ids = {
            part: torch.tensor(tokenizer.encode((text_dir / f"{part}.txt").read_text(encoding="utf-8")).ids)
            for part in ("train", "heldout")
        }
    model = make_model(args)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(ids['train']):,} training tokens, {len(ids['heldout']):,} held out")
    steps = train(model, ids["train"], args)
    model.half().float().eval()  # the held-out perplexity is that of the weights as saved
    save(model, args.out_dir)
    perplexity, scored = heldout_perplexity(model, ids["heldout"], args.positions)
    write_card(args, parameters, steps, len(ids["train"]), perplexity, scored)
    print(f"held-out perplexity {perplexity:.4f} over {scored:,} tokens")


def write_card(args, parameters, steps, train_tokens, perplexity, scored):
    batch_tokens = args.batch * args.positions
    card = MODEL_CARD.format(
        parameters=parameters,
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        positions=args.positions,
        vocabulary=args.vocabulary,
        minutes=args.minutes,
        threads=torch.get_num_threads(),
        steps=steps,
        batch_tokens=batch_tokens,
        epochs=steps * batch_tokens / train_tokens,
        python=platform.python_version(),
        share=HELD_OUT_SHARE,
        perplexity=perplexity,
        scored=scored,
    )
    (args.out_dir / "README.md").write_text(card)


if __name__ == "__main__":
    main()
