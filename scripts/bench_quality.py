#!/usr/bin/env python3
"""Compare ways to quantize by the KL divergence from the float model on held-out text, over calibration draws.

    bench_quality.py --model demo=tests/data/demo_gpt2 --text build/demo/text --runs runs.json --table tables.md

Every variant quantizes the same calibration windows, and `gptq eval` scores every result on the same text. Runs are
added to the JSON file one by one, and those already there are not repeated. gptqmodel takes part when
--gptqmodel-python names an interpreter that has it.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

from bench_quality_table import PEER, QUIET_SHARE, markdown
from bench_quality_windows import draw_windows

WORKER = Path(__file__).with_name("bench_quality_gptqmodel.py")

# All keep lm_head in float, as gptqmodel does, where the flags do not say otherwise.
# Names that begin with gptqmodel are run by it, with flags of bench_quality_gptqmodel.py; other flags are the driver's.
VARIANTS = {
    "rtn": "--mode rtn",
    "classic": "--mode classic",
    PEER: "",
    "default": "",
    "default without target": "--target-alpha 0",
    "default without act-order": "--act-order off",
    "default without bias correction": "--no-bias-correction",
    "default without scale search": "--scale-search minmax",
    "default without refinement": "--refine-sweeps 0",
    "default without row guard": "--no-row-guard",
    "default with damping 0.05": "--damping 0.05",
    "default with searched damping": "--search-damping",
    "default with lm_head in 8 bits": "--lm-head w8",
    "default with lm_head in 4 bits": "--lm-head w4",
}

# Threads that spin while they wait slow each other down manyfold on a busy machine. gptqmodel needs a second worker of
# its own where it would start only one.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"}


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    flags: tuple[str, ...]

    @property
    def is_peer(self):
        return self.name.startswith(PEER)

    @property
    def needs_calibration(self):
        return "rtn" not in self.flags


def parse_variant(text):
    """Parse "name=flags"."""
    name, separator, flags = text.partition("=")
    if not separator or not name.strip():
        raise argparse.ArgumentTypeError(f"must be name=flags, got {text!r}")
    return Variant(name.strip(), tuple(shlex.split(flags)))


def parse_grid(text):
    """Parse "BITSgGROUP", like 4g128, into (bits, group size)."""
    match = re.fullmatch(r"([2-8])g(-1|[1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be bits, g and the group size, like 4g128, got {text!r}")
    return int(match[1]), int(match[2])


def parse_model(text):
    """Parse "name=folder" or "folder"."""
    name, separator, folder = text.rpartition("=")
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{path} must be a Hugging Face folder with config.json")
    return (name if separator else path.name), path


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", type=parse_model, action="append", required=True, metavar="[NAME=]FOLDER", help="float GPT-2 folder"
    )
    parser.add_argument("--text", type=Path, required=True, help="folder with train.txt and heldout.txt")
    parser.add_argument("--runs", type=Path, required=True, help="JSON file the runs are added to")
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--driver", type=Path, default=Path("build/bin/gptq"), help="default: %(default)s")
    parser.add_argument("--gptqmodel-python", type=Path, help="interpreter with gptqmodel (default: it is left out)")
    parser.add_argument("--only", help="comma-separated names of variants to run (default: all)")
    parser.add_argument(
        "--variant", type=parse_variant, action="append", default=[], metavar="NAME=FLAGS", help="one more variant"
    )
    parser.add_argument(
        "--grids",
        type=parse_grid,
        nargs="+",
        default=[(4, 128), (4, 32), (3, 128), (2, 128)],
        metavar="4g128",
        help="bits and group sizes (default: 4g128 4g32 3g128 2g128)",
    )
    parser.add_argument("--draws", type=int, default=5, help="calibration draws: seeds 0 to DRAWS - 1")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--max-tokens", type=int, default=40000, help="held-out tokens to score")
    parser.add_argument("--no-score", action="store_true", help="time only")
    parser.add_argument("--redo", default="", help="comma-separated names of variants to run again")
    args = parser.parse_args()
    for path in (args.driver, args.text / "train.txt", args.text / "heldout.txt", args.gptqmodel_python):
        if path and not path.is_file():
            parser.error(f"{path} does not exist")
    return args


def select_variants(args):
    """Return the variants to run, in order; refuse names and flags that are not known."""
    known = [Variant(name, tuple(shlex.split(flags))) for name, flags in VARIANTS.items()] + args.variant
    names = {variant.name for variant in known}
    wanted = {name.strip() for name in args.only.split(",")} if args.only else names
    if wanted - names:
        raise SystemExit(f"--only: no variant is called {', '.join(sorted(wanted - names))}")
    chosen = [variant for variant in known if variant.name in wanted]
    if not args.gptqmodel_python:
        if args.only and any(variant.is_peer for variant in chosen):
            raise SystemExit(f"--only: {PEER} needs --gptqmodel-python")
        chosen = [variant for variant in chosen if not variant.is_peer]
    usage = call([args.driver, "quantize", "--help"]).stdout
    for variant in chosen:
        for flag in variant.flags if not variant.is_peer else ():
            if flag.startswith("--") and not re.search(rf"{flag}(?![\w-])", usage):
                raise SystemExit(f"{variant.name}: {args.driver} does not know {flag}; leave it out with --only")
    return chosen


def call(command, question=None):
    """Run a command quietly, the question on its standard input; on failure end with what it said."""
    environment = ENVIRONMENT | os.environ
    parts = [str(part) for part in command]
    result = subprocess.run(parts, input=question, capture_output=True, text=True, check=False, env=environment)
    if result.returncode != 0:
        message = "\n".join(result.stderr.strip().splitlines()[-12:])
        raise SystemExit(f"{shlex.join(map(str, command))}\n  ended with {result.returncode}: {message}")
    return result


def busy_seconds():
    """Processor seconds spent by the whole machine and by this process's finished children."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), children.ru_utime + children.ru_stime


def timed_call(command):
    """Run a command; return its wall and processor seconds and the share of the machine that others took meanwhile."""
    machine, own = busy_seconds()
    start = time.perf_counter()
    call(command)
    wall = time.perf_counter() - start
    machine, own = (after - before for after, before in zip(busy_seconds(), (machine, own), strict=True))
    return {
        "wall_seconds": wall,
        "processor_seconds": own,
        "others_share": max(0.0, (machine - own) / (wall * os.cpu_count())),
    }


class Bench:
    """The runs so far, and what a run needs."""

    def __init__(self, args, scratch):
        self.args = args
        self.scratch = scratch
        self.ids = {}
        self.runs = json.loads(args.runs.read_text())["runs"] if args.runs.is_file() else []
        redo = {name.strip() for name in args.redo.split(",")}
        self.runs = [run for run in self.runs if run["variant"] not in redo]

    def save(self):
        machine = {"processor": processor_name(), "cores": os.cpu_count(), "python": platform.python_version()}
        text = json.dumps({"machine": machine, "runs": self.runs}, indent=1) + "\n"
        partial = self.args.runs.with_name(self.args.runs.name + ".partial")
        partial.write_text(text)
        partial.replace(self.args.runs)
        if self.args.table:
            self.args.table.write_text(markdown(self.runs))

    def windows(self, model, draw):
        """Return a file with the token ids of one draw."""
        name, folder = model
        path = self.scratch / f"windows_{name}_{draw}.json"
        if not path.is_file():
            if name not in self.ids:
                text = (self.args.text / "train.txt").read_bytes().decode("utf-8")
                answer = call([self.args.driver, "tokenize", folder], json.dumps(text)).stdout
                self.ids[name] = json.loads(answer)
            drawn = draw_windows(self.ids[name], self.args.samples, self.args.sequence_length, draw)
            path.write_text(json.dumps(drawn))
        return path

    def describe(self, model, variant, grid, draw):
        """Return what tells a run from others."""
        return {
            "model": model[0],
            "variant": variant.name,
            "flags": list(variant.flags),
            "bits": grid[0],
            "group_size": grid[1],
            "draw": draw if variant.needs_calibration else None,
            "samples": self.args.samples if variant.needs_calibration else None,
            "sequence_length": self.args.sequence_length if variant.needs_calibration else None,
            "max_tokens": None if self.args.no_score else self.args.max_tokens,
        }

    def has(self, description):
        return any(description.items() <= run.items() for run in self.runs)

    def command(self, model, variant, grid, draw, out, report):
        """Return the command that quantizes into `out`."""
        common = ["--bits", grid[0], "--group-size", grid[1], *variant.flags, "--json", report]
        if variant.is_peer:
            head = [self.args.gptqmodel_python, WORKER, model[1], out]
            return [*head, "--windows", self.windows(model, draw), *common]
        draws = ["--samples", self.args.samples, "--sequence-length", self.args.sequence_length, "--seed", draw]
        head = [self.args.driver, "quantize", model[1], "-o", out, "--calibration", self.args.text / "train.txt"]
        keep_head = [] if "--lm-head" in variant.flags else ["--lm-head", "keep"]
        return [*head, *draws, *keep_head, *common]

    def score(self, model, out):
        """Score the model in `out` against the float one."""
        report = self.scratch / "eval.json"
        text = ["--text", self.args.text / "heldout.txt", "--max-tokens", self.args.max_tokens]
        call([self.args.driver, "eval", out, "--reference", model[1], *text, "--json", report])
        scores = json.loads(report.read_text())
        return {
            "kl": scores["kl_divergence"]["quantized"],
            "perplexity": scores["perplexity"]["quantized"],
            "baseline_perplexity": scores["perplexity"]["baseline"],
            "top1_agreement": scores["top1_agreement"]["quantized"],
            "tokens_scored": scores["tokens_scored"],
        }

    def run(self, model, variant, grid, draw):
        """Quantize and score once; add the run."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            out, path = Path(folder) / "model", Path(folder) / "report.json"
            times = timed_call(self.command(model, variant, grid, draw, out, path))
            report = json.loads(path.read_text())
            run = self.describe(model, variant, grid, draw) | times
            if variant.is_peer:
                run["seconds"] = report["seconds"]
                run["weight_difference"] = max(report["weight_difference"].values())
            else:
                # Includes loading the model and reading the calibration text, which gptqmodel's figure leaves out.
                run["seconds"] = report["seconds"]["total"]
                run["seconds_quantize"] = report["seconds"]["quantize"]
            if not self.args.no_score:
                run |= self.score(model, out)
        self.runs.append(run)
        self.save()
        return run

    def warm_up_peer(self, variant, model, grid):
        """Let gptqmodel compile, outside the timing, the extensions it builds at first use."""
        windows, report = self.scratch / "warm_up.json", self.scratch / "warm_up_report.json"
        windows.write_text(json.dumps([[1] * 64] * 2))
        command = [self.args.gptqmodel_python, WORKER, model[1], self.scratch / "warm_up"]
        call([*command, "--windows", windows, "--bits", grid[0], *variant.flags, "--json", report])


def processor_name():
    match = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else platform.machine()


def progress_line(run, done, total):
    line = f"[{done}/{total}] {run['model']}, {run['bits']} bit, g = {run['group_size']}, draw {run['draw']}, "
    line += f"{run['variant']}: {run['seconds']:.1f} s"
    if run["others_share"] > QUIET_SHARE:
        line += f" (others took {run['others_share']:.0%} of the machine)"
    return line + (f", KL {1e6 * run['kl']:.1f}e-6" if "kl" in run else "")


def plan_runs(bench, variants):
    """Return the runs that are still missing.

    Draws come outermost, so that every cell of the table has as many when it is stopped early; variants innermost, so
    that their times are interleaved.
    """
    args = bench.args
    every = itertools.product(range(args.draws), args.model, args.grids, variants)
    return [
        (model, variant, grid, draw)
        for draw, model, grid, variant in every
        if (draw == 0 or variant.needs_calibration) and not bench.has(bench.describe(model, variant, grid, draw))
    ]


def main():
    args = parse_arguments()
    variants = select_variants(args)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        plan = plan_runs(bench, variants)
        warm = set()
        for done, (model, variant, grid, draw) in enumerate(plan, 1):
            if variant.is_peer and (variant.name, grid[0]) not in warm:
                warm.add((variant.name, grid[0]))
                bench.warm_up_peer(variant, model, grid)
            print(progress_line(bench.run(model, variant, grid, draw), done, len(plan)), flush=True)
        bench.save()


if __name__ == "__main__":
    main()
