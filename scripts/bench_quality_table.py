#!/usr/bin/env python3
"""Write the runs of bench_quality.py as Markdown tables.

bench_quality_table.py RUNS.json [--out TABLES.md]
"""

import argparse
import json
import statistics
from pathlib import Path

PEER = "gptqmodel"
# A run counts as undisturbed when other processes took less than this share of the machine.
QUIET_SHARE = 0.05


def spread(values, form):
    """Return mean ± standard deviation, without the latter for a single value."""
    text = form.format(statistics.fmean(values))
    if len(values) < 2:
        return text
    return f"{text} ± {form.format(statistics.stdev(values)).lstrip('+')}"


def perplexity_increase(run):
    return 100 * (run["perplexity"] / run["baseline_perplexity"] - 1)


def divergence_cell(runs, peer_runs):
    """KL divergence in units of 1e-6 nats and, in parentheses, how many times the peer's."""
    values = [1e6 * run["kl"] for run in runs]
    text = spread(values, "{:.0f}")
    if peer_runs:
        ratio = statistics.fmean(values) / statistics.fmean(1e6 * run["kl"] for run in peer_runs)
        text += f" ({ratio:.2f}×)"
    return text


def perplexity_cell(runs, _):
    return spread([perplexity_increase(run) for run in runs], "{:+.3f}")


def seconds_cell(runs, peer_runs):
    """Median seconds and, in parentheses, how many times faster than the peer."""
    median = statistics.median(run["seconds"] for run in runs)
    text = f"{median:.1f}"
    if peer_runs:
        text += f" ({statistics.median(run['seconds'] for run in peer_runs) / median:.1f}×)"
    return text


def table(runs, cell):
    """Return a Markdown table: a row a variant, a column a grid; both in the order in which they first appear."""
    grids = sorted({(run["bits"], run["group_size"]) for run in runs}, reverse=True)
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    draws = len({run["draw"] for run in runs} - {None})
    lines = ["| variant | " + " | ".join(f"{bits} bit, g = {group}" for bits, group in grids) + " |"]
    lines.append("| --- |" + " --- |" * len(grids))
    for variant in variants:
        cells = []
        for grid in grids:
            at_grid = [run for run in runs if (run["bits"], run["group_size"]) == grid]
            own = [run for run in at_grid if run["variant"] == variant]
            peer = [run for run in at_grid if run["variant"] == PEER]
            # The same draws on both sides, where the variant has draws.
            peer = [run for run in peer if run["draw"] in {other["draw"] for other in own}] or peer
            fewer = own and own[0]["draw"] is not None and len(own) < draws
            cells.append((cell(own, peer) if own else "–") + (f", {len(own)} of {draws} draws" if fewer else ""))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draws_note(runs):
    counts = sorted({run["draw"] for run in runs if run["draw"] is not None})
    setups = sorted({(run["samples"], run["sequence_length"]) for run in runs if run["draw"] is not None})
    windows = ", ".join(f"{samples} windows of {length} tokens" for samples, length in setups)
    return f"{len(counts)} calibration draws of {windows}" if counts else "No calibration"


def speed_table(runs):
    timed = [run for run in runs if run["draw"] is not None and "seconds" in run]
    if not timed:
        return ""
    disturbed = sum(run["others_share"] > QUIET_SHARE for run in timed)
    note = "Median seconds from the start of quantizing to the written checkpoint"
    note += f" (how many times faster than {PEER})." if any(run["variant"] == PEER for run in timed) else "."
    if disturbed:
        note += f" **{disturbed} of {len(timed)} timed runs shared the machine with others: do not trust these times.**"
    return f"{note}\n\n{table(timed, seconds_cell)}\n"


def markdown(runs):
    """Return the tables of every model."""
    parts = []
    for model in dict.fromkeys(run["model"] for run in runs):
        of_model = [run for run in runs if run["model"] == model]
        scored = [run for run in of_model if "kl" in run]
        parts.append(f"## {model}\n")
        if scored:
            perplexities = sorted({f"{run['baseline_perplexity']:.3f}" for run in scored})
            tokens = sorted({run["tokens_scored"] for run in scored})
            parts.append(
                f"{draws_note(scored)}; {', '.join(map(str, tokens))} held-out tokens scored; float perplexity "
                f"{', '.join(perplexities)}. Mean ± standard deviation over the draws.\n"
            )
            parts.append(f"KL divergence from the float model, 10⁻⁶ nats a token (times {PEER}'s):\n")
            parts.append(table(scored, divergence_cell) + "\n")
            parts.append("Perplexity increase, %:\n")
            parts.append(table(scored, perplexity_cell) + "\n")
        parts.append(speed_table(of_model))
    return "\n".join(part for part in parts if part)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="JSON file that bench_quality.py wrote")
    parser.add_argument("--out", type=Path, help="file to write (default: standard output)")
    args = parser.parse_args()
    text = markdown(json.loads(args.runs.read_text())["runs"])
    if args.out:
        args.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
