"""The parts of the quality benchmark that need neither the driver nor gptqmodel."""

import argparse
import itertools
import json

import pytest
import torch
from bench_quality import VARIANTS, Bench, Variant, parse_grid, parse_variant, plan_runs
from bench_quality_gptqmodel import dequantize, format_version, read_checkpoint, replace_weights, unpack_words
from bench_quality_table import markdown, spread
from bench_quality_windows import draw_windows, mt19937_64
from safetensors.torch import load_file, save_file


def pack_words(values, bits):
    """Pack along dimension 0 into int32 words, lowest bit first."""
    columns = []
    for column in values.T.tolist():
        stream = sum(value << (bits * i) for i, value in enumerate(column))
        words = [(stream >> (32 * i)) % 2**32 for i in range(len(column) * bits // 32)]
        columns.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int32).T


def gptq_layer(bits, version, inputs=64, outputs=32, group=32):
    """Return a layer's tensors and the weight they stand for, its zero points including 0 and the largest code."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(2**bits, (inputs // group, outputs), generator=generator)
    zeros[0, 0], zeros[1, 0] = 0, 2**bits - 1
    scales = torch.rand(zeros.shape, generator=generator).half()
    groups = torch.arange(inputs).flip(0) // group
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    tensors = {
        "qweight": pack_words(codes, bits).contiguous(),
        "qzeros": pack_words(stored.T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": groups.int(),
    }
    weight = torch.tensor(
        [
            [(codes[i, o] - zeros[groups[i], o]).item() * scales[groups[i], o].item() for o in range(outputs)]
            for i in range(inputs)
        ]
    )
    return tensors, weight


def test_nibbles_come_lowest_first():
    words = torch.tensor([[0x76543210], [-0x01234568]], dtype=torch.int32)  # the second is 0xFEDCBA98
    assert unpack_words(words, 4, 16).flatten().tolist() == list(range(16))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize(bits, version):
    tensors, weight = gptq_layer(bits, version)
    torch.testing.assert_close(dequantize(tensors, bits, version), weight, rtol=0, atol=0)


def test_format_version():
    assert format_version({"checkpoint_format": "gptq"}) == 1
    assert format_version({"format": "gptq_v2"}) == 2
    with pytest.raises(ValueError, match="marlin"):
        format_version({"checkpoint_format": "marlin"})


def test_a_checkpoint_becomes_a_float_folder(tmp_path):
    tensors, weight = gptq_layer(4, 1)
    checkpoint, source = tmp_path / "checkpoint", tmp_path / "source"
    checkpoint.mkdir()
    source.mkdir()
    named = {f"transformer.h.0.mlp.c_fc.{kind}": tensor for kind, tensor in tensors.items()}
    save_file(named | {"transformer.ln_f.weight": torch.ones(4)}, checkpoint / "model.safetensors")
    (checkpoint / "quantize_config.json").write_text('{"bits": 4, "checkpoint_format": "gptq"}')
    original = {"h.0.mlp.c_fc.weight": (1.1 * weight).half(), "wte.weight": torch.ones(3, 2).half()}
    save_file(original, source / "model.safetensors")
    (source / "config.json").write_text('{"dtype": "float16", "n_embd": 64}')
    (source / "vocab.json").write_text("{}")

    weights = read_checkpoint(checkpoint)
    assert list(weights) == ["h.0.mlp.c_fc"]
    differences = replace_weights(source, weights, tmp_path / "out")
    assert differences["h.0.mlp.c_fc"] == pytest.approx(0.1 / 1.1, rel=1e-2)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["h.0.mlp.c_fc.weight"], weight)
    assert torch.equal(written["wte.weight"], torch.ones(3, 2))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"dtype": "float32", "n_embd": 64}
    assert (tmp_path / "out" / "vocab.json").is_file()

    with pytest.raises(ValueError, match="misread"):
        replace_weights(source, {"h.0.mlp.c_fc": -weight}, tmp_path / "out")
    with pytest.raises(ValueError, match="must be"):
        replace_weights(source, {"h.0.mlp.c_fc": weight.T}, tmp_path / "out")


def test_the_generator_is_the_standards():
    # The C++ standard fixes the 10000th number for the seed 5489.
    assert next(itertools.islice(mt19937_64(5489), 9999, None)) == 9981545732273789042
    assert list(itertools.islice(mt19937_64(0), 2)) == [2947667278772165694, 18301848765998365067]


def test_windows_are_the_drivers():
    # The same numbers as in tests/model/calibration_test.cpp.
    windows = draw_windows(list(range(1000)), 2, 17, 5489)
    starts = [14514284786278117030 % 984, 4620546740167642908 % 984]
    assert windows == [list(range(start, start + 17)) for start in starts]
    with pytest.raises(ValueError, match="at least one window of 17 tokens, has 16"):
        draw_windows(list(range(16)), 1, 17, 0)


def test_parse_variant():
    assert parse_variant("a b=--damping 0.05 --no-row-guard") == Variant("a b", ("--damping", "0.05", "--no-row-guard"))
    assert parse_variant("plain=") == Variant("plain", ())
    assert parse_variant("gptqmodel float32=--dtype float32").is_peer
    assert not parse_variant("nearest=--mode rtn").needs_calibration
    for text in ("name", "=--flag"):
        with pytest.raises(argparse.ArgumentTypeError, match="name=flags"):
            parse_variant(text)
    for name, flags in VARIANTS.items():
        assert parse_variant(f"{name}={flags}").name == name


def test_parse_grid():
    assert parse_grid("4g128") == (4, 128)
    assert parse_grid("3g-1") == (3, -1)
    for text in ("4", "9g128", "4g0", "4x32"):
        with pytest.raises(argparse.ArgumentTypeError, match="like 4g128"):
            parse_grid(text)


def test_runs_already_made_are_not_planned(tmp_path):
    rtn, default = parse_variant("rtn=--mode rtn"), parse_variant("default=")
    args = argparse.Namespace(
        **{"model": [("demo", tmp_path)], "grids": [(4, 128), (4, 32)], "draws": 2, "redo": "", "no_score": False},
        **{"samples": 8, "sequence_length": 16, "max_tokens": 100, "runs": tmp_path / "runs.json", "table": None},
    )
    bench = Bench(args, tmp_path)
    plan = plan_runs(bench, [rtn, default])
    assert [(variant.name, grid[1], draw) for _, variant, grid, draw in plan] == [
        *[("rtn", 128, 0), ("default", 128, 0), ("rtn", 32, 0), ("default", 32, 0)],
        *[("default", 128, 1), ("default", 32, 1)],
    ]
    bench.runs = [bench.describe(*planned) for planned in plan[:5]]
    bench.save()
    assert plan_runs(Bench(args, tmp_path), [rtn, default]) == plan[5:]
    args.redo = "default"
    assert plan_runs(Bench(args, tmp_path), [rtn, default]) == [planned for planned in plan if planned[1] == default]
    args.redo, args.samples = "", 9  # other calibration: other runs, except where there is none
    assert len(plan_runs(Bench(args, tmp_path), [rtn, default])) == 4


def run(variant, draw, kl, *, bits=4, group_size=128, seconds=1.0, others_share=0.0):
    """Return a run as bench_quality.py records it."""
    return {
        **{"model": "demo", "variant": variant, "bits": bits, "group_size": group_size, "draw": draw},
        **{"samples": None if draw is None else 8, "sequence_length": None if draw is None else 16},
        **{"kl": kl, "perplexity": 10.1, "baseline_perplexity": 10.0, "tokens_scored": 100},
        **{"seconds": seconds, "others_share": others_share},
    }


def test_table():
    runs = [
        run("rtn", None, 4e-3),
        run("gptqmodel", 0, 0.9e-3, seconds=8.0),
        run("gptqmodel", 1, 1.1e-3, seconds=12.0),
        run("default", 0, 0.4e-3, seconds=2.0),
        run("default", 1, 0.6e-3, seconds=3.0),
        run("default", 0, 0.2e-3, group_size=32, seconds=4.0),
    ]
    text = markdown(runs)
    assert "(0.44×)" in markdown([*runs[:2], runs[3]])  # against the same draw
    assert "| variant | 4 bit, g = 128 | 4 bit, g = 32 |" in text
    assert "| rtn | 4000 (4.00×) | – |" in text
    assert "| gptqmodel | 1000 ± 141 (1.00×) | – |" in text
    assert "| default | 500 ± 141 (0.50×) | 200, 1 of 2 draws |" in text
    assert "| default | +1.000 ± 0.000 | +1.000, 1 of 2 draws |" in text
    assert "2 calibration draws of 8 windows of 16 tokens; 100 held-out tokens scored" in text
    assert "| default | 2.5 (4.0×) | 4.0, 1 of 2 draws |" in text
    assert "busy" not in text
    assert "1 of 7 timed runs shared" in markdown([*runs, run("default", 2, 0.5e-3, others_share=0.5), runs[1]])


def test_table_of_times_alone():
    timed = [run(name, 0, 0.0) for name in ("gptqmodel", "default")]
    for entry in timed:
        for key in ("kl", "perplexity", "baseline_perplexity", "tokens_scored"):
            del entry[key]
    text = markdown(timed)
    assert "| default | 1.0 (1.0×) |" in text
    assert "KL" not in text


def test_spread():
    assert spread([2.0], "{:.1f}") == "2.0"
    assert spread([1.0, 3.0], "{:+.1f}") == "+2.0 ± 1.4"
