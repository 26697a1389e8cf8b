#!/usr/bin/env python3
"""Draw what `gptq quantize --json` reports: how far the models are from the float one, and the error of every layer.

    plot_report.py REPORT.json OUT.png

Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"rtn": "#b0b7c3", "quantized": "#1f6feb"}
LABELS = {"rtn": "round to nearest", "quantized": "GPTQ"}


def draw_divergence(axes, report):
    kinds = ["rtn", "quantized"]
    values = [report["kl_divergence"][kind] for kind in kinds]
    bars = axes.barh([LABELS[kind] for kind in kinds], values, color=[COLOURS[kind] for kind in kinds], height=0.55)
    for bar, kind, value in zip(bars, kinds, values, strict=True):
        text = f" {value:.5f}   perplexity {report['perplexity'][kind]:.3f}"
        axes.text(value, bar.get_y() + bar.get_height() / 2, text, va="center", fontsize=9)
    axes.set_xlim(0, 1.9 * max(values))
    axes.invert_yaxis()
    baseline = report["perplexity"]["baseline"]
    axes.set_title(f"KL divergence from the float model (perplexity {baseline:.3f})", fontsize=10)
    axes.set_xlabel("nats per token")


def draw_layers(axes, layers):
    names = [layer["name"].removeprefix("transformer.") for layer in layers]
    for kind, key in (("rtn", "rtn_relative_error"), ("quantized", "relative_error")):
        values = [100 * layer[key] for layer in layers]
        axes.plot(range(len(layers)), values, "o-", ms=3, lw=1, color=COLOURS[kind], label=LABELS[kind])
    axes.set_xticks(range(len(layers)), names, rotation=90, fontsize=6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("%")
    axes.set_title("Relative error of each layer's output", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5.6), height_ratios=(1, 2), layout="constrained")
    draw_divergence(top, report)
    draw_layers(bottom, report["layers"])
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
