#!/usr/bin/env python3
"""Score a GGUF file with llama.cpp, as `gptq eval` scores a folder.

    peer_gguf.py FILE --text FILE --json FILE [--window 256] [--max-tokens 2048]

tests/python/test_gguf.py runs it with the interpreter that GPTQ_LLAMA_PYTHON names, which needs cyllama (wheels with
llama.cpp in them) and numpy.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from cyllama.llama import llama_cpp


class Model(llama_cpp.LlamaModel):
    """A model that has what cyllama 0.2.18 asks it for when it hands out logits."""

    @property
    def n_vocab(self):
        """Return the size of the vocabulary."""
        return self.get_vocab().n_vocab


def surprises(context, tokens):
    """Return the negative log-probabilities of the tokens but the first, each given those before it."""
    context.kv_cache_clear()
    batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
    for position, token in enumerate(tokens):
        batch.add(token, position, [0], True)
    context.decode(batch)
    logits = np.array([context.get_logits_ith(i) for i in range(len(tokens) - 1)], np.float64)
    logits -= logits.max(1, keepdims=True)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(tokens) - 1), tokens[1:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="GGUF file")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True, help="where to write the result")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=2048)
    args = parser.parse_args()
    llama_cpp.disable_logging()
    model = Model(str(args.file), llama_cpp.LlamaModelParams())
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = args.window
    context = llama_cpp.LlamaContext(model, params)
    text = args.text.read_text(encoding="utf-8")
    ids = model.get_vocab().tokenize(text, add_special=False, parse_special=True)
    scored = ids[: args.max_tokens]
    windows = [scored[begin : begin + args.window] for begin in range(0, len(scored), args.window)]
    losses = np.concatenate([surprises(context, window) for window in windows if len(window) > 1])
    report = {"perplexity": math.exp(losses.mean()), "tokens_scored": losses.size, "ids": ids}
    args.json.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
