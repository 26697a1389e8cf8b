"""``python -m gptq`` runs the command-line driver, with the torch of this environment."""

import importlib.util
import os
import sys
from pathlib import Path


def main() -> None:
    """Replace this process by the driver: GPTQ_DRIVER, the one shipped in the package, or the checkout's build/bin."""
    package = Path(__file__).resolve().parent
    override = os.environ.get("GPTQ_DRIVER")
    candidates = [Path(override)] if override else [package / "bin" / "gptq", package.parents[2] / "build/bin/gptq"]
    driver = next((path for path in candidates if path.is_file()), None)
    if driver is None:
        sys.exit(f"gptq: the driver was not found: looked for {' and '.join(map(str, candidates))}")
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        sys.exit("gptq: the driver needs torch, which this Python does not have")
    paths = [os.path.join(torch.submodule_search_locations[0], "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    os.execv(driver, ["gptq", *sys.argv[1:]])


if __name__ == "__main__":
    main()
