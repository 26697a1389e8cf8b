#!/usr/bin/env python3
"""Bring GPT-2 and WikiText-2 from the Hugging Face hub, for measurements on the usual model and text.

    fetch_gpt2.py [OUT_DIR]

writes OUT_DIR/gpt2 (openai-community/gpt2: configuration, weights, tokenizer) and, from the raw WikiText-2,
OUT_DIR/wikitext-2-raw/{train,valid,test}.txt. What is there already is left alone. Needs huggingface_hub.
"""

import argparse
import hashlib
import sys
import zipfile
from pathlib import Path

from huggingface_hub import hf_hub_download

MODEL = "openai-community/gpt2"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
# The archive that llama.cpp's perplexity figures are taken on; the dataset's own repository holds only parquet files.
TEXT_REPOSITORY = "ggml-org/ci"
TEXT_ARCHIVE = "wikitext-2-raw-v1.zip"
TEXT_SHA256 = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"


def fetch_model(folder):
    for name in MODEL_FILES:
        if not (folder / name).is_file():
            hf_hub_download(MODEL, name, local_dir=folder)


def fetch_text(folder):
    targets = {part: folder / f"{part}.txt" for part in ("train", "valid", "test")}
    if all(path.is_file() for path in targets.values()):
        return
    archive = Path(hf_hub_download(TEXT_REPOSITORY, TEXT_ARCHIVE, repo_type="dataset"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != TEXT_SHA256:
        raise ValueError(f"{TEXT_ARCHIVE} has SHA-256 {digest}, expected {TEXT_SHA256}")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as members:
        for part, path in targets.items():
            path.write_bytes(members.read(f"wikitext-2-raw/wiki.{part}.raw"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", nargs="?", type=Path, default=Path("build/gpt2"), help="default: build/gpt2")
    out_dir = parser.parse_args().out_dir
    try:
        fetch_model(out_dir / "gpt2")
        fetch_text(out_dir / "wikitext-2-raw")
    except Exception as error:  # whatever the hub's client raises: the person needs one line, not its stack
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        sys.exit(f"fetch_gpt2: could not bring the files from the hub: {reason}")
    print(f"{out_dir}/gpt2\n{out_dir}/wikitext-2-raw")


if __name__ == "__main__":
    main()
