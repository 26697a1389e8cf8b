#!/usr/bin/env python3
"""Gather English and code text that every Python installation carries.

The text is the standard library's own sources and the reference documentation in pydoc_data.
It is split by file into a training part and a held-out part: a file is held out when the SHA-256
of its relative path says so, so that the split is the same on every machine and Python version.

    gather_text.py OUT_DIR

writes OUT_DIR/train.txt and OUT_DIR/heldout.txt (UTF-8).
"""

import argparse
import hashlib
import importlib
import sysconfig
from pathlib import Path

# Tests are not part of every distribution's Python; the code pages are tables, not text.
SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib-dynload",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
HELD_OUT_SHARE = 24  # one file in so many


def stdlib_documents():
    """Yield (name, text) of every standard library source file and documentation topic."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.name.startswith("_sysconfigdata"):
            yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def is_held_out(name):
    """Whether the document belongs to the held-out part."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT_SHARE == 0


def gather(out_dir):
    """Write train.txt and heldout.txt under out_dir and return their sizes in bytes."""
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = {"train": [], "heldout": []}
    for name, text in stdlib_documents():
        if text.strip():
            parts["heldout" if is_held_out(name) else "train"].append(text.rstrip() + "\n")
    sizes = {}
    for part, texts in parts.items():
        data = "\n".join(texts).encode("utf-8")
        (out_dir / f"{part}.txt").write_bytes(data)
        sizes[part] = len(data)
    return sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    args = parser.parse_args()
    for part, size in gather(args.out_dir).items():
        print(f"{args.out_dir / part}.txt: {size:,} bytes")


if __name__ == "__main__":
    main()
