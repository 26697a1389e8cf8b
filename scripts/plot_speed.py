#!/usr/bin/env python3
"""Draw and tabulate what `gptq bench linear --json` and bench_peers.py --json measured.

    plot_speed.py OUT_DIR --linear avx512vnni=vnni.json --linear avx2=avx2.json [--dram dram.json] [--peers peers.json]

Writes speed_levels.png (speedup over torch float32 by rows, one line for each instruction set), speed_bandwidth.png
(share of the read bandwidth by size of the weight, one row) and, with --peers, speed_peers.png; prints the tables.
"""

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PEER_DTYPES = {"float32 input": ("linear_w4 exact", "f32"), "bfloat16 input": ("linear_w4 exact bf16", "bf16")}
DRAWN_DENSE = "torch f32"
MOST_COLUMNS = 4
OWN_COLOURS = {"linear_w4 exact": "#1f6feb", "linear_w4 int8": "#8250df", "linear_w4 exact bf16": "#1f6feb"}


def parse_labelled(text):
    label, separator, path = text.partition("=")
    if not separator or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"must be LABEL=FILE, got {text!r}")
    return label, json.loads(Path(path).read_text())


def parse_report(text):
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return json.loads(Path(text).read_text())


def shapes_of(report):
    """Return the (K, N) of a report in its order."""
    return list(dict.fromkeys((result["k"], result["n"]) for result in report["results"]))


def of_shape(report, shape):
    return [result for result in report["results"] if (result["k"], result["n"]) == shape]


def packed_megabytes(result):
    return result["k"] * result["n"] / 2e6


def panels(shapes, title_of):
    columns = min(len(shapes), MOST_COLUMNS)
    rows = math.ceil(len(shapes) / columns)
    size = (3.2 * columns, 3.2 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for unused in axes[len(shapes) :]:
        unused.set_visible(False)
    axes = axes[: len(shapes)]
    for each, shape in zip(axes, shapes, strict=True):
        each.set_title(title_of(shape), fontsize=9)
        each.set_xscale("log", base=2)
        each.set_yscale("log")
        each.axhline(1, color="#b0b7c3", lw=1)
        each.set_xlabel("rows of the input, M")
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_line(axes, results, name, **style):
    results = [result for result in results if name in result["speedup"]]
    rows = [result["m"] for result in results]
    ratios = [result["speedup"][name] for result in results]
    axes.plot(rows, [ratio["median"] for ratio in ratios], "o-", ms=3, lw=1.2, **style)
    if len(rows) > 0:
        colour = axes.lines[-1].get_color()
        low, high = ([ratio[key] for ratio in ratios] for key in ("p10", "p90"))
        axes.fill_between(rows, low, high, alpha=0.15, lw=0, color=colour)


def draw_levels(levels, path):
    shapes = shapes_of(levels[0][1])
    figure, axes = panels(shapes, lambda shape: f"{shape[0]} × {shape[1]}")
    for each, shape in zip(axes, shapes, strict=True):
        for label, report in levels:
            draw_line(each, of_shape(report, shape), "exact", label=label)
    axes[0].set_ylabel("times as fast as torch float32")
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def draw_bandwidth(levels, dram, path):
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    reports = [*levels, *([("from memory", dram)] if dram else [])]
    for label, report in reports:
        results = sorted((result for result in report["results"] if result["m"] == 1), key=packed_megabytes)
        shares = [100 * result["share_of_reading"]["median"] for result in results]
        axes.plot([packed_megabytes(result) for result in results], shares, "o-", ms=3, lw=1.2, label=label)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("packed weight, MB")
    axes.set_ylabel("% of the reading loop's speed, M = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def draw_peers(report, path):
    shapes = shapes_of(report)
    names = [name for name in report["results"][0]["speedup"] if "bf16" not in name and name != DRAWN_DENSE]
    figure, axes = panels(shapes, lambda shape: f"{shape[0]} × {shape[1]}")
    for each, shape in zip(axes, shapes, strict=True):
        for name in names:
            draw_line(each, of_shape(report, shape), name, label=name, color=OWN_COLOURS.get(name))
    axes[0].set_ylabel("times as fast as torch float32")
    axes[-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


def cell(ratio):
    return f"{ratio['median']:.1f} ({ratio['p10']:.1f}–{ratio['p90']:.1f})"


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("| --- |" + " ---: |" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print()


def print_levels(levels):
    for label, report in levels:
        print(f"{label}, {report['threads']} threads, {report['rounds']} rounds\n")
        rows = []
        for result in report["results"]:
            share = f"{100 * result['share_of_reading']['median']:.0f} %" if result["m"] == 1 else ""
            speedup = result["speedup"]
            cells = [cell(speedup[name]) for name in ("exact", "int8", "exact bf16")]
            rows.append([f"{result['k']} × {result['n']}", result["m"], *cells, share])
        table(["K × N", "M", "exact", "int8", "exact, bfloat16 input", "of reading"], rows)


def print_peers(report):
    """Print how many times as fast as each peer linear_w4 is, by shape and rows."""
    for title, (own, dtype) in PEER_DTYPES.items():
        if own not in report["results"][0]["speedup"]:
            continue
        names = [
            name for name in report["results"][0]["speedup"] if name != own and ("bf16" in name) == (dtype == "bf16")
        ]
        rows = []
        for result in report["results"]:
            seconds = {name: result["seconds"][name]["median"] for name in [own, *names]}
            ratios = [f"{seconds[name] / seconds[own]:.1f}" for name in names]
            rows.append([f"{result['k']} × {result['n']}", result["m"], f"{1e6 * seconds[own]:.0f}", *ratios])
        print(f"{title}: {own} in µs, and how many times as long each peer takes\n")
        table(["K × N", "M", "µs", *names], rows)
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--linear", type=parse_labelled, action="append", required=True, metavar="LABEL=FILE")
    parser.add_argument("--dram", type=parse_report, help="gptq bench linear --regime dram")
    parser.add_argument("--peers", type=parse_report, action="append", default=[], help="may be given again")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    draw_levels(args.linear, args.out_dir / "speed_levels.png")
    draw_bandwidth(args.linear, args.dram, args.out_dir / "speed_bandwidth.png")
    print_levels(args.linear)
    for report in args.peers:
        if DRAWN_DENSE in report["results"][0]["speedup"]:
            draw_peers(report, args.out_dir / "speed_peers.png")
        print_peers(report)


if __name__ == "__main__":
    main()
