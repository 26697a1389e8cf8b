"""The real GPT-2 vocabulary, rebuilt from the ranks that the package openai-whisper ships.

    gpt2_vocabulary.py OUT_DIR

writes vocab.json and merges.txt. The ranks file lists each token's bytes in base64 with its rank; the rank is the
token's id, and every token past the first 256 is made by one merge: of the two parts that the merges of lower rank
leave of its bytes.
"""

import base64
import importlib.util
import itertools
import json
import sys
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"


def ranks_file():
    """Path of gpt2.tiktoken, or None where openai-whisper is not installed."""
    spec = importlib.util.find_spec("whisper")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "assets" / "gpt2.tiktoken"
    return path if path.exists() else None


def byte_alphabet():
    """The printable character that stands for each byte (GPT-2's bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in alphabet]
    alphabet.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return alphabet


def last_merge(token, ranks):
    """The two parts of a token before its last merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        at = pair_ranks.index(min(pair_ranks))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def write_gpt2_vocabulary(out_dir):
    lines = ranks_file().read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    alphabet = byte_alphabet()

    def spell(token):
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT] = len(vocabulary)
    merged = sorted((token for token in ranks if len(token) > 1), key=ranks.get)
    merges = [" ".join(map(spell, last_merge(token, ranks))) for token in merged]
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "vocab.json").write_text(json.dumps(vocabulary))
    (out_dir / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_gpt2_vocabulary(sys.argv[1])
