"""The driver's perplexity and greedy text against transformers' GPT2LMHeadModel."""

import argparse
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = os.environ.get("GPTQ_DRIVER", str(REPOSITORY / "build/bin/gptq"))
DEMO_MODEL = REPOSITORY / "tests/data/demo_gpt2"
TEXT = Path(argparse.__file__).read_text(encoding="utf-8")[:12000]
POSITIONS = 96

# What differs between configurations, the dtype of the file, and how it is saved.
MODELS = {
    "plain": ({}, torch.float32, {}),
    "inner": (
        {"n_inner": 37, "activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True},
        torch.float16,
        {},
    ),
    "untied": (
        {"tie_word_embeddings": False, "activation_function": "relu", "scale_attn_weights": False},
        torch.bfloat16,
        {},
    ),
    "sharded": (
        {"activation_function": "silu", "reorder_and_upcast_attn": True, "layer_norm_epsilon": 1e-3},
        torch.float32,
        {"max_shard_size": "40KB"},
    ),
    "quick": ({"activation_function": "quick_gelu", "n_head": 1, "n_layer": 1}, torch.float16, {}),
    "tanh": ({"activation_function": "gelu_pytorch_tanh", "n_head": 24}, torch.bfloat16, {}),
}


def run(*arguments, report):
    """Run the driver and return its JSON report."""
    subprocess.run([DRIVER, *map(str, arguments), "--json", str(report)], check=True, capture_output=True)
    return json.loads(Path(report).read_text())


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(params=[*MODELS, "demo"], scope="module")
def model_folder(request, tmp_path_factory, tokenizer_folder):
    if request.param == "demo":
        return DEMO_MODEL
    settings, dtype, saving = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    defaults = {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": POSITIONS, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, bos_token_id=0, eos_token_id=0, **{**defaults, **settings})
    GPT2LMHeadModel(config).to(dtype).save_pretrained(folder, **saving)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    return folder


@torch.no_grad()
def reference_perplexity(model, ids, window, stride):
    """The recipe of the Hugging Face documentation: tokens seen in an earlier window are context only."""
    total, count, seen = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        chunk = torch.tensor(ids[begin:end])
        labels = chunk.clone()
        labels[: len(chunk) - (end - seen)] = -100
        scored = int((labels[1:] != -100).sum())
        if scored:
            logits = model(chunk.unsqueeze(0)).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
            count += scored
        seen = end
        if end == len(ids):
            break
    return math.exp(total / count), count


@pytest.mark.parametrize("window, stride", [(96, 96), (96, 41), (17, 17)])
def test_perplexity(model_folder, tmp_path, window, stride):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    ids = Tokenizer.from_file(str(model_folder / "tokenizer.json")).encode(TEXT).ids
    model = GPT2LMHeadModel.from_pretrained(model_folder, dtype=torch.float32).eval()
    expected, scored = reference_perplexity(model, ids, window, stride)
    report = run(
        "eval", model_folder, "--text", text, "--window", window, "--stride", stride, report=tmp_path / "eval.json"
    )
    assert report["tokens_scored"] == scored
    # Both compute in f32, in another order: 1e-5 relative is what the project promises.
    assert report["perplexity"]["baseline"] == pytest.approx(expected, rel=1e-5)


def test_greedy_tokens(model_folder, tmp_path):
    prompt = "def __init__(self"
    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    model = GPT2LMHeadModel.from_pretrained(model_folder, dtype=torch.float32).eval()
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    report = run(
        "generate", model_folder, "--prompt", prompt, "--max-new-tokens", 64, report=tmp_path / "generate.json"
    )
    assert report["tokens"] == expected[0, ids.shape[1] :].tolist()
