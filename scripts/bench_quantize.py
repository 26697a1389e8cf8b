#!/usr/bin/env python3
"""Time quantizing one weight beside the published algorithm as a Python loop of torch operations.

    bench_quantize.py --json quantize.json

All run in one process, one after the other in every round. `gptq bench quantize` compares with the same operations
called from C++, which takes the interpreter out of the comparison. With --device cuda all of it is on a CUDA device,
beside the Cholesky factorisation by itself.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import gptq
import torch

BLOCK = 128
PEER = "published"
CHOLESKY = "Cholesky alone"


def symmetric_grid(columns, bits):
    """Return the scale and zero point of every row."""
    most = columns.amax(1, keepdim=True).clamp_min(0)
    least = columns.amin(1, keepdim=True).clamp_max(0)
    size = torch.maximum(-least, most)
    size = torch.where(size == 0, torch.ones_like(size), size)
    return 2 * size / (2**bits - 1), torch.full_like(size, 2 ** (bits - 1))


def published(weight, hessian, bits, group_size, damping):
    """Quantize as the reference implementation of GPTQ (Frantar et al., 2022) does; return the values and losses."""
    hessian, weight = hessian.clone(), weight.clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    values, losses = torch.zeros_like(weight), torch.zeros_like(weight)
    for first in range(0, weight.shape[1], BLOCK):
        last = min(first + BLOCK, weight.shape[1])
        block, corner = weight[:, first:last].clone(), factor[first:last, first:last]
        quantized, errors, costs = (torch.zeros_like(block) for _ in range(3))
        for i in range(last - first):
            column, pivot = block[:, i], corner[i, i]
            if (first + i) % group_size == 0:
                scale, zero = symmetric_grid(weight[:, first + i : first + i + group_size], bits)
            code = torch.clamp(torch.round(column.unsqueeze(1) / scale) + zero, 0, 2**bits - 1)
            value = (scale * (code - zero)).flatten()
            quantized[:, i] = value
            costs[:, i] = (column - value) ** 2 / pivot**2
            error = (column - value) / pivot
            block[:, i:] -= error.unsqueeze(1).matmul(corner[i, i:].unsqueeze(0))
            errors[:, i] = error
        values[:, first:last], losses[:, first:last] = quantized, costs / 2
        weight[:, last:] -= errors.matmul(factor[first:last, last:])
    return values, losses.sum()


def contenders(weight, hessian, group_size):
    """Return a call for every contender, by name."""
    plain = {"scale_search": "minmax", "refine_sweeps": 0, "row_guard": False, "compare": False}
    flags = {
        "sweep": plain,
        "classic": {**plain, "mode": "classic"},
        "sweep, search, refinement": {"row_guard": False, "compare": False},
        "default": {},
    }
    calls = {PEER: lambda: published(weight, hessian, 4, group_size, 0.01)}
    for name, options in flags.items():
        calls[name] = lambda options=options: gptq.quantize_weight(weight, hessian, group_size=group_size, **options)
    if weight.is_cuda:
        damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
        calls[CHOLESKY] = lambda: torch.linalg.cholesky(damped)
    return calls


def random_layer(rows, columns, device="cpu"):
    """Return a weight, and the Hessian of inputs whose channels are correlated."""
    generator = torch.Generator().manual_seed(42)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(2 * columns, columns, generator=generator) @ mixing
    weight = weight.to(device)
    layer = gptq.GPTQLayer(weight)
    layer.add_batch(inputs.to(device))
    return weight, layer.hessian()


def spread(values):
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def seconds_of(call, device):
    """Return how long a call takes, until the device has done it."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape, rounds, group_size, device="cpu"):
    """Return the seconds of every contender, and how many times faster than the peer it is, round by round."""
    times = {}
    calls = contenders(*random_layer(*shape, device), group_size)
    for round_number in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            seconds = seconds_of(call, device)
            if round_number:
                times.setdefault(name, []).append(seconds)
    return summary(shape, times)


def summary(shape, times):
    """Return the spread of all seconds, and of how many times faster than the peer each is."""
    peer = times[PEER]
    ratios = {
        name: spread([theirs / ours for theirs, ours in zip(peer, seconds, strict=True)])
        for name, seconds in times.items()
        if name not in (PEER, CHOLESKY)
    }
    return {
        "shape": list(shape),
        "seconds": {name: spread(seconds) for name, seconds in times.items()},
        "speedup": ratios,
    }


def parse_shape(text):
    try:
        rows, columns = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NxK, got {text!r}") from None
    if rows < 1 or columns < 1:
        raise argparse.ArgumentTypeError(f"must be NxK with N and K at least 1, got {text!r}")
    return rows, columns


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", default=[(768, 768), (3072, 768), (768, 3072), (4096, 4096)]
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds, after one to warm up (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "bench_quantize.py: --device cuda needs a CUDA device, torch sees none\n")
    if args.threads:
        torch.set_num_threads(args.threads)
    results = []
    for shape in args.shapes:
        result = measure(shape, args.rounds, args.group_size, args.device)
        results.append(result)
        line = f"{shape[0]:5} x {shape[1]:<5}  published {1e3 * result['seconds'][PEER]['median']:8.1f} ms"
        for name, ratio in result["speedup"].items():
            line += f"   {name} {ratio['median']:.1f}x ({ratio['least']:.1f} to {ratio['most']:.1f})"
        if CHOLESKY in result["seconds"]:
            default, factor = (1e3 * result["seconds"][name]["median"] for name in ("default", CHOLESKY))
            line += f"   default {default:.1f} ms, of which Cholesky alone takes {factor:.1f} ms"
        print(line, flush=True)
    if args.json:
        name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        report = {"device": name, "threads": torch.get_num_threads(), "rounds": args.rounds, "shapes": results}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
