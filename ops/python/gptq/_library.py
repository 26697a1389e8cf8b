"""Finds libgptq.so, checks that it fits the torch in use, and loads it."""

import json
import os
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent


def _candidates() -> list[Path]:
    override = os.environ.get("GPTQ_LIBRARY")
    if override:
        return [Path(override)]
    shipped = _PACKAGE / "lib" / "libgptq.so"
    built = _PACKAGE.parents[2] / "build" / "lib" / "libgptq.so"  # the package inside a checkout
    return [shipped, built]


def find_library() -> Path:
    """Return the path of libgptq.so.

    GPTQ_LIBRARY names it; otherwise it is the one shipped in the package or, in a checkout, the one under build/lib.

    Raises:
        ImportError: none of these exists.
    """
    candidates = _candidates()
    for path in candidates:
        if path.is_file():
            return path
    raise ImportError(
        f"gptq: libgptq.so was not found: looked for {' and '.join(map(str, candidates))}; "
        "build it, or set GPTQ_LIBRARY to its path"
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def load_library() -> dict[str, Any]:
    """Load libgptq.so into this process and return what its build recorded: {"version", "torch"}.

    A library that has no record beside it is loaded as it is.

    Raises:
        ImportError: no library, or it was built for another torch, or it does not load.
    """
    path = find_library()
    record = path.with_suffix(".json")
    info = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    built_for = info.get("torch")
    if built_for is not None and built_for != _minor(torch.__version__):
        raise ImportError(
            f"gptq: {path} was built for torch {built_for}, this is torch {torch.__version__}; "
            "install a matching torch or build libgptq again with this one"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = error.__cause__ or error  # torch wraps the loader's message
        raise ImportError(f"gptq: {path} does not load with torch {torch.__version__}: {reason}") from error
    return info
