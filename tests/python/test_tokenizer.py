"""The C++ tokenizer against Hugging Face tokenizers: the same ids on every string."""

import json
import os
import random
import subprocess
import unicodedata
from pathlib import Path

import pytest
from gpt2_vocabulary import END_OF_TEXT, byte_alphabet, ranks_file, write_gpt2_vocabulary
from tokenizers import AddedToken, ByteLevelBPETokenizer, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = os.environ.get("GPTQ_DRIVER", str(REPOSITORY / "build" / "bin" / "gptq"))
DEMO_MODEL = REPOSITORY / "tests" / "data" / "demo_gpt2"
LAST_CODE_POINT = 0x10FFFF

FRAGMENTS = [
    *["the", "quick", "brown", "fox", "I'm", "you're", "we've", "he'll", "she'd", "it's", "don't"],
    *["'S", "'LL", "''ll", "'s's", "'", "''", "I’m"],
    *[
        "def f(x):\n    return x**2\n",
        "for (int i = 0; i < n; ++i) {\n\t\ta[i] += 1;\n}",
        "\\u0041\\n",
        "=>",
        "!=",
        "////",
    ],
    *["0", "42", "3.14159", "1e-10", "٣٤٥", "Ⅷ", "½", "²", "१२३", "𝟘𝟙"],
    *[
        "你好，世界",
        "日本語のテキスト",
        "한국어",
        "עברית",
        "العربية",
        "ไทย",
        "हिन्दी",
        "Ελληνικά",
        "кириллица",
        "naïve café",
    ],
    *["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "e\u0301\u0327", "ﬁ", "ß", "İ", "ſ", "\u1e9e"],
    *[END_OF_TEXT, "<|endoftext", "|endoftext|>", "<|", "|>", "<|endoftext|><|endoftext|>"],
    *[" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n\n", "\v", "\f", "\x00", "\x1c\x1d\x1e\x1f", "\x7f", "\x85", "\xa0"],
    *[
        "\u1680",
        "\u180e",
        "\u2000\u2001",
        "\u200b",
        "\u200c\u200d",
        "\u2028",
        "\u2029",
        "\u202e",
        "\u202f",
        "\u3000",
        "\ufeff",
    ],
]


def random_code_point(generator):
    while True:
        limit = generator.choice([0x7F, 0xFF, 0x2FFF, 0xFFFF, 0x1FFFF, 0x3FFFF, LAST_CODE_POINT])
        code_point = generator.randint(0, limit)
        if not 0xD800 <= code_point <= 0xDFFF:
            return chr(code_point)


def generate_strings():
    """About 2,900 strings of fragments, random Unicode, white space, controls and long runs."""
    generator = random.Random(20230415)
    white = [c for c in map(chr, range(0x3001)) if c.isspace() or c in "\u180e\u200b\u2060"]
    strings = ["", *FRAGMENTS]
    for _ in range(1200):
        strings.append(
            "".join(
                generator.choice(FRAGMENTS) + generator.choice(["", " ", ""]) for _ in range(generator.randint(1, 12))
            )
        )
    for _ in range(700):
        strings.append("".join(random_code_point(generator) for _ in range(generator.randint(1, 40))))
    for _ in range(400):
        mix = [*white, *"aZ9'.é", *map(chr, range(32))]
        strings.append("".join(generator.choice(mix) for _ in range(generator.randint(1, 30))))
    for _ in range(300):
        strings.append("".join(generator.choice("'stdmlvre rRS09. ") for _ in range(generator.randint(1, 40))))
    for _ in range(200):
        words = [generator.choice(["a", "ab", " ", "\n", "é", "1", "=", "😀", "\u3000"]) for _ in range(2)]
        strings.append(words[0] * generator.randint(1, 700) + words[1] * generator.randint(0, 300))
    return strings


STRINGS = generate_strings()


def code_points():
    """Every code point of the planes that have assigned characters, and some of the others."""
    points = [
        *range(0x40000),
        *range(0x40000, 0xE0000, 257),
        *range(0xE0000, 0xE0200),
        *range(0xF0000, LAST_CODE_POINT, 257),
    ]
    return [chr(c) for c in points if not 0xD800 <= c <= 0xDFFF]


def batches(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def run_driver(folder, lines):
    return subprocess.run(
        [DRIVER, "tokenize", str(folder)],
        input="\n".join(map(json.dumps, lines)) + "\n",
        capture_output=True,
        encoding="utf-8",
    )


def answers(folder, lines):
    result = run_driver(folder, lines)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.split("\n")[:-1]]


def check_same(folder, reference, strings):
    expected = [e.ids for e in reference.encode_batch(strings, add_special_tokens=False)]
    for text, got, want in zip(strings, answers(folder, strings), expected, strict=True):
        assert got == want, f"{text[:80]!r}"
    texts = reference.decode_batch(expected, skip_special_tokens=False)
    for got, want in zip(answers(folder, expected), texts, strict=True):
        assert got == want


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    if ranks_file() is None:
        pytest.skip("needs the package openai-whisper, which ships GPT-2's ranks")
    folder = tmp_path_factory.mktemp("gpt2")
    write_gpt2_vocabulary(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2_reference(gpt2_folder):
    reference = ByteLevelBPETokenizer(str(gpt2_folder / "vocab.json"), str(gpt2_folder / "merges.txt"))
    reference.add_special_tokens([END_OF_TEXT])
    return reference._tokenizer


def train_tokenizer(special_tokens):
    reference = ByteLevelBPETokenizer()
    reference.train_from_iterator(STRINGS[:1500], vocab_size=1200, special_tokens=special_tokens, show_progress=False)
    return reference._tokenizer


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer([END_OF_TEXT])


def save(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_there_are_enough_strings():
    assert len(set(STRINGS)) >= 2000


def test_gpt2_vocabulary(gpt2_folder, gpt2_reference):
    # Known ids of the published model.
    assert gpt2_reference.encode("Hello world" + END_OF_TEXT).ids == [15496, 995, 50256]
    check_same(gpt2_folder, gpt2_reference, STRINGS)


def test_class_of_every_code_point(tmp_path):
    """Merges of a, 1, . and a line break with every byte show whether the split pattern keeps a character with them."""
    alphabet = list(byte_alphabet().values())
    merges = [(first, byte) for first in ["a", "1", ".", "Ċ"] for byte in alphabet]
    tokens = [*alphabet, *(first + byte for first, byte in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    save(tokenizer, tmp_path)
    for points in batches(code_points(), 1 << 14):
        check_same(
            tmp_path, tokenizer, ["".join(f"a{c} 1{c} .{c} \n{c} " for c in part) for part in batches(points, 64)]
        )


def test_gpt2_tokenizer_json(gpt2_reference, tmp_path):
    check_same(save(gpt2_reference, tmp_path), gpt2_reference, STRINGS)


def test_merges_written_as_strings(trained, tmp_path):
    definition = json.loads(trained.to_str())
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    check_same(tmp_path, trained, STRINGS)


def test_trained_vocabulary(trained, tmp_path):
    check_same(save(trained, tmp_path), trained, STRINGS)


def test_demo_vocabulary():
    if not (DEMO_MODEL / "tokenizer.json").exists():
        pytest.skip("the demo model is not there")
    check_same(DEMO_MODEL, Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")), STRINGS)


def test_added_token_flags(tmp_path):
    tokenizer = train_tokenizer([END_OF_TEXT])
    tokens = [
        AddedToken("[L]", lstrip=True, normalized=False),
        AddedToken("[R]", rstrip=True, normalized=False),
        AddedToken("[LR]", lstrip=True, rstrip=True, special=True),
        AddedToken("word", single_word=True, normalized=False),
        AddedToken("[N]", normalized=True),
        AddedToken("[N][R]", normalized=True),
        AddedToken("[L][L]", normalized=False),
        AddedToken("日本", normalized=False),
        AddedToken("é", normalized=False),
        AddedToken("  ", normalized=True),
    ]
    tokenizer.add_tokens(tokens)
    generator = random.Random(7)
    parts = [t.content for t in tokens] + [
        " ",
        "   ",
        "\n",
        "\u180e",
        "\u3000",
        "x",
        "_",
        "9",
        ".",
        "é",
        "\u0301",
        "\u200d",
        END_OF_TEXT,
    ]
    strings = ["".join(generator.choices(parts, k=generator.randint(1, 14))) for _ in range(1000)]
    check_same(save(tokenizer, tmp_path), tokenizer, strings)


def test_single_word_beside_every_code_point(tmp_path):
    tokenizer = train_tokenizer([END_OF_TEXT])
    tokenizer.add_tokens([AddedToken("[W]", single_word=True, normalized=False)])
    save(tokenizer, tmp_path)
    for points in batches(code_points(), 1 << 14):
        check_same(tmp_path, tokenizer, ["".join(f"[W]{c}[W] " for c in part) for part in batches(points, 64)])


@pytest.mark.parametrize(
    "steps",
    [
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
                    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        [
            pre_tokenizers.Split(Regex(r"[\r\n]"), "isolated"),
            pre_tokenizers.Split(Regex(r"\s?\p{L}+"), "isolated"),
            pre_tokenizers.ByteLevel(),
        ],
        [pre_tokenizers.Split(Regex(r"\s+|\S"), "removed"), pre_tokenizers.ByteLevel()],
        [pre_tokenizers.Split(Regex(r"\p{L}*"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)],
        [pre_tokenizers.Split(Regex(r"\p{M}|\p{L}"), "removed", invert=True), pre_tokenizers.ByteLevel()],
        [pre_tokenizers.Split("'s ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    ],
)
def test_pre_tokenizers(steps, tmp_path):
    tokenizer = train_tokenizer([END_OF_TEXT])
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    check_same(save(tokenizer, tmp_path), tokenizer, STRINGS)


@pytest.mark.parametrize(
    "unknown", [{}, {"unk_token": "<unk>"}, {"unk_token": "<unk>", "fuse_unk": True}, {"ignore_merges": True}]
)
def test_incomplete_alphabet(unknown, tmp_path):
    """Bytes that are not in the vocabulary are dropped or become unk_token."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "a", "b", "Ġ", "ab", "Ġa", "<unk>a", "bab", "xyz"])}
    merges = [("a", "b"), ("Ġ", "a"), ("<unk>", "a")]
    tokenizer = Tokenizer(BPE(vocabulary, merges, **unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    strings = ["ab", "axb", "xxa", "aéab", "bab", "xyz", " a x", "xax", "", *STRINGS[:300]]
    check_same(save(tokenizer, tmp_path), tokenizer, strings)


def test_tokenizer_config(gpt2_folder, tmp_path):
    """tokenizer_config.json beside vocab.json adds tokens and the prefix space."""
    for name in ["vocab.json", "merges.txt"]:
        (tmp_path / name).symlink_to(gpt2_folder / name)
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    added = {"50256": {"content": END_OF_TEXT, **flags}, "50257": {"content": "[PAD]", **flags}}
    config = {"add_prefix_space": True, "eos_token": END_OF_TEXT, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), add_prefix_space=True)
    reference.add_special_tokens([END_OF_TEXT, "[PAD]"])
    check_same(tmp_path, reference._tokenizer, [*STRINGS[:300], "a[PAD]b", f"[PAD]{END_OF_TEXT}"])


@pytest.mark.parametrize(
    "text", ["a" * 300_007, " " * 300_007 + "x", "ab" * 100_000, "\u3000" * 100_003, "é\n" * 50_000]
)
def test_long_runs(trained, tmp_path, text):
    check_same(save(trained, tmp_path), trained, [text])


def test_decode_of_broken_characters(gpt2_folder, gpt2_reference):
    generator = random.Random(3)
    lists = [[generator.randrange(50257) for _ in range(generator.randint(0, 20))] for _ in range(500)]
    lists += [[generator.randrange(256) for _ in range(generator.randint(0, 20))] for _ in range(500)]
    want = gpt2_reference.decode_batch(lists, skip_special_tokens=False)
    assert answers(gpt2_folder, lists) == want


def test_strings_come_back(gpt2_folder):
    strings = [unicodedata.normalize("NFC", s) for s in STRINGS]
    assert answers(gpt2_folder, answers(gpt2_folder, strings)) == strings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda d: d.update(pre_tokenizer=None), "pre_tokenizer"),
        (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer.type"),
        (lambda d: d.update(post_processor={"type": "TemplateProcessing"}), "post_processor"),
        (lambda d: d["model"].update(type="WordPiece"), "model.type"),
        (lambda d: d["model"].update(dropout=0.5), "model.dropout"),
        (lambda d: d["model"].update(byte_fallback=True), "model.byte_fallback"),
        (lambda d: d["model"].update(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
        (lambda d: d["model"].update(vocab={}), "model.vocab"),
        (lambda d: d["model"].pop("merges"), "model.merges"),
        (lambda d: d["added_tokens"][0].update(id=77), "added_tokens"),
    ],
)
def test_unsupported_files(trained, tmp_path, change, message):
    definition = json.loads(trained.to_str())
    change(definition)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    result = run_driver(tmp_path, ["text"])
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert "tokenizer.json: " + message in result.stderr


@pytest.mark.parametrize("line", ["{}", "[1.5]", "text", "", "[-1]", "[100000]"])
def test_bad_input_lines(trained, tmp_path, line):
    save(trained, tmp_path)
    result = subprocess.run([DRIVER, "tokenize", str(tmp_path)], input=f'"a"\n{line}\n', capture_output=True, text=True)
    assert result.returncode != 0
    assert "line 2" in result.stderr
