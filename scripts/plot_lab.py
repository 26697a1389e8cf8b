#!/usr/bin/env python3
"""Draw and tabulate what the studies of `gptq lab` found.

    plot_lab.py FOLDER...                       draws each study's plots into its folder
    plot_lab.py --compare FOLDER... -o OUT.html one page with the plots and tables of all, side by side
    plot_lab.py --markdown PAGE.md FOLDER...    brings the tables of a Markdown page up to date

A table of the page stands between the lines <!-- FOLDER: TABLE --> and <!-- end -->. Needs matplotlib.
"""

import argparse
import base64
import html
import io
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

# Okabe and Ito's colours, which the colour-blind can tell apart.
ORANGE, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#8a8a8a"
METHODS = {
    "rtn": ("round to nearest", ORANGE),
    "gptq": ("GPTQ", BLUE),
    "gptq_act_order": ("GPTQ, act-order", GREEN),
    "library": ("quantize_weight", GREY),
}
INPUTS = {"normal": "normal inputs", "cauchy": "heavy-tailed (Cauchy) inputs"}
CASES = {
    "independent": "independent channels",
    "matched": "correlated, matched",
    "mismatched": "correlated, mismatched",
}
OUTLIERS = {"none": "no outliers", "weight": "outlier columns in the weight", "input": "outlier channels in the inputs"}


class LabError(Exception):
    """What a person did wrong, in one line."""


def panels(count, width=4.0, height=3.4):
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e5e5e5", lw=0.7)
    return figure, axes[0]


def legend(axis, **options):
    axis.legend(frameon=False, fontsize=8, **options)


def method_line(axis, x, y, method, **options):
    label, colour = METHODS[method]
    axis.plot(x, y, "o-", ms=4, lw=1.3, color=colour, label=label, **options)


def draw_row_losses(results):
    figure, axes = panels(len(results["runs"]))
    for axis, run in zip(axes, results["runs"], strict=True):
        losses = {name: method["row_loss"] for name, method in run["methods"].items() if name != "library"}
        order = sorted(range(len(losses["rtn"])), key=losses["rtn"].__getitem__)
        for name, values in losses.items():
            label, colour = METHODS[name]
            axis.plot([values[row] for row in order], ".", ms=2.5, color=colour, label=label)
        axis.set(yscale="log", title=INPUTS[run["inputs"]], xlabel="row, by its loss when rounded to nearest")
    axes[0].set_ylabel("loss of the row")
    legend(axes[0], markerscale=3)
    return figure


def draw_samples(results):
    points = results["samples"]
    figure, (axis,) = panels(1, width=5.6)
    x = [point["samples"] for point in points]
    for key, label, colour in (
        ("ratio", "on the inputs calibrated on", BLUE),
        ("ratio_fresh", "on fresh inputs", GREEN),
    ):
        axis.plot(x, [point[key] for point in points], "o-", ms=4, lw=1.3, color=colour, label=label)
    axis.axhline(1, color=ORANGE, lw=1, label="round to nearest")
    axis.set(xscale="log", ylim=(0, None), xlabel="calibration inputs", ylabel="loss of GPTQ / loss of rounding")
    axis.axvline(results["settings"]["columns"], color=GREY, lw=0.8, ls=":", label="inputs = columns")
    legend(axis)
    return figure


def group_labels(results):
    return ["row" if row["group_size"] == -1 else str(row["group_size"]) for row in results["groups"]]


def draw_group_errors(results):
    figure, axes = panels(3, width=3.5)
    labels = group_labels(results)
    for axis, key, title in zip(
        axes,
        ("mse", "loss", "heldout_loss"),
        ("mean square error of the weights", "loss on the calibration inputs", "loss on other inputs"),
        strict=True,
    ):
        for method in ("rtn", "gptq"):
            method_line(axis, labels, [row[method][key] for row in results["groups"]], method)
        axis.set(title=title, xlabel="group size", yscale="log" if key == "loss" else "linear")
        if key != "loss":
            axis.set_ylim(bottom=0)
        axis.title.set_fontsize(10)
    axes[0].set_ylabel("weight²")
    axes[1].set_ylabel("output²")
    axes[2].set_ylabel("output²")
    legend(axes[0])
    return figure


def draw_compression(results):
    figure, (left, right) = panels(2)
    labels = group_labels(results)
    for key, label, colour in (
        ("compression_32", "of 32 bits", ORANGE),
        ("compression_16", "of 16 bits", BLUE),
    ):
        left.plot(labels, [row[key] for row in results["groups"]], "o-", ms=4, lw=1.3, color=colour, label=label)
    left.set(xlabel="group size", ylabel="times smaller", ylim=(0, None), title="compression")
    legend(left)
    bits = [row["effective_bits"] for row in results["groups"]]
    for method in ("rtn", "gptq"):
        method_line(right, bits, [100 * row[method]["relative_error"] for row in results["groups"]], method)
    for x, row, label in zip(bits, results["groups"], labels, strict=True):
        y = 100 * max(row["rtn"]["relative_error"], row["gptq"]["relative_error"])
        right.annotate(label, (x, y), xytext=(2, 4), textcoords="offset points", fontsize=7, color="#555")
    right.set(xlabel="bits per weight", ylabel="%", title="relative error on other inputs", ylim=(0, None))
    legend(right)
    return figure


def draw_calibration(results):
    figure, grid = plt.subplots(2, 3, figsize=(10.5, 6), layout="constrained", sharex=True)
    for column, case in enumerate(results["cases"]):
        x = [point["samples"] for point in case["points"]]
        for axis, key in zip(grid[:, column], ("heldout_loss", "mse"), strict=True):
            mean = [point[key]["mean"] for point in case["points"]]
            low = [point[key]["mean"] - point[key]["min"] for point in case["points"]]
            high = [point[key]["max"] - point[key]["mean"] for point in case["points"]]
            deviation = [point[key]["std"] for point in case["points"]]
            axis.errorbar(x, mean, yerr=[low, high], fmt="none", ecolor="#9ecae1", elinewidth=4)
            axis.errorbar(x, mean, yerr=deviation, fmt="o-", ms=3, lw=1.2, capsize=3, color=BLUE, label="GPTQ")
            axis.axhline(case["rtn"][key], color=ORANGE, lw=1.2, label="round to nearest")
            axis.set(xscale="log", ylim=(0, None))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e5e5e5", lw=0.7)
        grid[0, column].set_title(CASES[case["case"]], fontsize=10)
        grid[1, column].set_xlabel("calibration samples")
    grid[0, 0].set_ylabel("loss on held-out inputs, output²")
    grid[1, 0].set_ylabel("mean square error, weight²")
    legend(grid[0, 0])
    return figure


def draw_bits(results):
    figure, axes = panels(len(results["cases"]), width=3.6, height=3.9)
    granularities = {"tensor": GREEN, "row": ORANGE, "group": BLUE}
    for axis, case in zip(axes, results["cases"], strict=True):
        for granularity, colour in granularities.items():
            rows = [row for row in case["rows"] if row["granularity"] == granularity]
            x = [row["bits"] for row in rows]
            for method, style in (("rtn", "o--"), ("gptq", "o-")):
                y = [100 * row[method]["relative_error"] for row in rows]
                label = f"{METHODS[method][0]}, per {granularity}"
                axis.plot(x, y, style, ms=3.5, lw=1.3, color=colour, label=label)
        axis.set(yscale="log", xticks=sorted({row["bits"] for row in case["rows"]}), xlabel="bits per code")
        axis.set_title(OUTLIERS[case["outliers"]], fontsize=10)
    axes[0].set_ylabel("relative error on other inputs, %")
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(low, high)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def toy_tables(results):
    head = ["inputs", "method", "loss", "ratio", "ratio, undamped H", "ratio, fresh inputs", "ratio of MSE"]
    head += ["codes that differ", "rows worse"]
    rows = []
    for run in results["runs"]:
        for name, method in run["methods"].items():
            changed = f"{100 * method['changed_share']:.2f} %" if "changed_share" in method else ""
            ratios = [method[key] for key in ("ratio", "ratio_undamped", "ratio_fresh", "ratio_mse")]
            rows.append(
                [run["inputs"], METHODS[name][0], f"{method['loss']:.5g}"]
                + [f"{ratio:.3f}" for ratio in ratios]
                + [changed, str(method["worse_rows"])]
            )
    samples = [
        [str(point["samples"]), f"{point['effective_rank']:.0f}"]
        + [f"{point[key]:.3f}" for key in ("ratio", "ratio_fresh", "ratio_mse")]
        for point in results["samples"]
    ]
    shape = [
        [run["inputs"], f"{run['effective_rank']:.1f}", f"{run['diagonal_mean']:.5g}", f"{run['diagonal_median']:.5g}"]
        + [f"{run['methods'][name]['gain_correlation']:.3f}" for name in ("gptq", "gptq_act_order")]
        for run in results["runs"]
    ]
    dampings = []
    for run in results["runs"]:
        for point in run["dampings"]:
            ratios = [point[name] for name in ("gptq", "gptq_act_order")]
            dampings.append(
                [run["inputs"], f"{point['damping']:g}"]
                + [f"{ratio[key]:.3g}" for key in ("ratio_undamped", "ratio_fresh", "ratio_mse") for ratio in ratios]
            )
    pairs = ["ratio, undamped H", "act-order", "fresh inputs", "act-order", "MSE", "act-order"]
    return {
        "losses": (head, rows),
        "damping": (["inputs", "damping", *pairs], dampings),
        "samples": (["inputs", "directions in use", "ratio", "ratio, fresh inputs", "ratio of MSE"], samples),
        "inputs": (
            ["inputs", "directions in use", "mean diag H", "median diag H"]
            + ["correlation of gain and RTN loss", "the same, act-order"],
            shape,
        ),
    }


def group_tables(results):
    head = ["group size", "bits per weight", "of 32 bits", "of 16 bits", "MSE, RTN", "MSE, GPTQ"]
    head += ["loss, RTN", "loss, GPTQ", "other inputs, RTN", "other inputs, GPTQ"]
    rows = [
        [label, f"{row['effective_bits']:.4f}", f"{row['compression_32']:.2f}×", f"{row['compression_16']:.2f}×"]
        + [f"{row[method]['mse']:.3e}" for method in ("rtn", "gptq")]
        + [f"{row[method][key]:.4g}" for key in ("loss", "heldout_loss") for method in ("rtn", "gptq")]
        for label, row in zip(group_labels(results), results["groups"], strict=True)
    ]
    return {"groups": (head, rows)}


def calibration_tables(results):
    tables = {}
    for case in results["cases"]:
        rows = [["RTN", f"{case['rtn']['mse']:.4e}", "", "", f"{case['rtn']['heldout_loss']:.4f}", "", ""]]
        for point in case["points"]:
            mse, loss = point["mse"], point["heldout_loss"]
            rows.append(
                [str(point["samples"]), f"{mse['mean']:.4e}", f"{mse['std']:.1e}"]
                + [f"{mse['min']:.4e} … {mse['max']:.4e}", f"{loss['mean']:.4f}", f"{loss['std']:.4f}"]
                + [f"{loss['min']:.4f} … {loss['max']:.4f}"]
            )
        head = ["samples", "MSE", "std", "min … max", "held-out loss", "std", "min … max"]
        tables[case["case"]] = (head, rows)
    return tables


def bits_tables(results):
    tables = {}
    for case in results["cases"]:
        rows = []
        for row in case["rows"]:
            rtn, gptq = (row[method]["relative_error"] for method in ("rtn", "gptq"))
            rows.append(
                [str(row["bits"]), row["granularity"], f"{row['effective_bits']:.3f}"]
                + [f"{100 * rtn:.3f} %", f"{100 * gptq:.3f} %", f"{gptq / rtn:.3f}"]
            )
        head = ["bits", "scale per", "bits per weight", "error, RTN", "error, GPTQ", "ratio"]
        tables[case["outliers"]] = (head, rows)
    return tables


# For every study: its title, its plots, its tables.
STUDIES = {
    "toy": (
        "One layer: GPTQ beside rounding to nearest",
        {"loss_curve.png": draw_row_losses, "samples.png": draw_samples},
        toy_tables,
    ),
    "group-size": (
        "Group size",
        {"error.png": draw_group_errors, "compression.png": draw_compression},
        group_tables,
    ),
    "calibration": ("Calibration", {"calibration.png": draw_calibration}, calibration_tables),
    "bits": ("Bits and granularity", {"bits.png": draw_bits}, bits_tables),
}


class Run:
    """The folder of one run of a study."""

    def __init__(self, folder):
        self.folder = folder
        try:
            self.results = json.loads((folder / "results.json").read_text())
            self.manifest = json.loads((folder / "manifest.json").read_text())
            self.study = self.results["study"]
            self.title, self.plots, tables = STUDIES[self.study]
            self.tables = tables(self.results)
        except OSError as error:
            raise LabError(f"{error.filename}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise LabError(f"{folder}: is not the output of a study ({error!r})") from None

    def draw(self):
        for name, draw in self.plots.items():
            figure = draw(self.results)
            buffer = io.BytesIO()
            figure.savefig(buffer, dpi=110)
            plt.close(figure)
            # A palette makes the file a third as large.
            Image.open(buffer).convert("RGB").quantize(64).save(self.folder / name, optimize=True)


STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --dim: #666; --line: #ddd; --back: #fff; --card: #f6f6f6; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --dim: #aaa; --line: #444; --back: #161616; --card: #222; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1800px; padding: 1rem; font: 16px/1.45 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
.runs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
article { background: var(--card); border-radius: 8px; padding: 0.8rem 1rem; min-width: 0; }
h3 { margin: 0 0 0.4rem; overflow-wrap: anywhere; }
p { color: var(--dim); font-size: 0.85rem; margin: 0.3rem 0; overflow-wrap: anywhere; }
img { width: 100%; height: auto; background: #fff; border-radius: 4px; margin: 0.3rem 0; display: block; }
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.2rem 0; }
th, td { padding: 0.15rem 0.6rem 0.15rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; font-weight: 600; white-space: normal; }
th:first-child, td:first-child { text-align: left; }
""".strip()


def html_table(caption, head, rows):
    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line("td", row) for row in rows)
    caption = f"<caption>{html.escape(caption)}</caption>"
    return f'<div class="scroll"><table>{caption}\n{line("th", head)}\n{body}\n</table></div>'


def html_run(run):
    manifest = run.manifest
    host, versions = manifest["host"], manifest["versions"]
    where = f"{manifest['threads']} threads of {host['cores']} cores, {host['processor']} ({host['instruction_set']})"
    parts = [
        f"<article><h3>{html.escape(run.folder.name)}</h3>",
        f"<p><code>{html.escape(manifest['command'])}</code></p>",
        f"<p>{html.escape(where)}; libgptq {html.escape(versions['gptq'])}, torch {html.escape(versions['torch'])}; "
        f"{manifest['seconds']:.1f} s on {html.escape(manifest['started'][:10])}</p>",
    ]
    for name in run.plots:
        image = base64.b64encode((run.folder / name).read_bytes()).decode()
        alt = html.escape(f"{run.folder.name}: {name}", quote=True)
        parts.append(f'<img alt="{alt}" src="data:image/png;base64,{image}">')
    parts += [html_table(name, *table) for name, table in run.tables.items()]
    return "\n".join([*parts, "</article>"])


def compare_page(runs):
    sections = []
    for study, (title, _, _) in STUDIES.items():
        of_study = [html_run(run) for run in runs if run.study == study]
        if of_study:
            sections.append(f'<h2>{html.escape(title)}</h2>\n<div class="runs">\n' + "\n".join(of_study) + "\n</div>")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Studies of GPTQ</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>Studies of GPTQ</h1>",
            *sections,
            "</body>\n</html>\n",
        ]
    )


def markdown_table(head, rows):
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def update_markdown(page, runs):
    tables = {f"{run.folder.name}: {name}": table for run in runs for name, table in run.tables.items()}

    def replaced(match):
        if match[1] not in tables:
            raise LabError(f"{page}: there is no table {match[1]}; there are {', '.join(sorted(tables))}")
        return f"<!-- {match[1]} -->\n\n{markdown_table(*tables[match[1]])}\n\n<!-- end -->"

    text = page.read_text()
    page.write_text(re.sub(r"<!-- ([\w-]+: [\w-]+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output of gptq lab")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--compare", action="store_true", help="write one HTML page of all folders")
    what.add_argument("--markdown", type=Path, metavar="PAGE.md", help="bring the tables of this page up to date")
    parser.add_argument("-o", "--output", type=Path, help="the HTML page")
    args = parser.parse_args()
    if args.compare != (args.output is not None):
        parser.error("--compare and -o go together")
    try:
        runs = [Run(folder) for folder in args.folders]
        if args.markdown:
            update_markdown(args.markdown, runs)
            return
        for run in runs:
            run.draw()
        if args.compare:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(compare_page(runs))
    except (LabError, OSError) as error:
        sys.exit(f"plot_lab.py: {error}")


if __name__ == "__main__":
    main()
