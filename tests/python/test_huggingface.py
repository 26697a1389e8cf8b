"""save_pretrained and from_pretrained of quantized transformers models, and their folders in the driver."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

pytest.importorskip("gptq")
import gptq.huggingface
from safetensors.torch import load_file, save_file
from small_models import gpt2, llama, quantized, token_ids, vit


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(2, 30, seed=9) if ids is None else ids).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a quantized GPT-2 and the folder that save_pretrained wrote."""
    folder = tmp_path_factory.mktemp("saved")
    model = quantized()
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize(
    "make,options",
    [
        (gpt2, {"lm_head": "keep"}),
        (gpt2, {"symmetric": False, "act_order": "dynamic", "lm_head": "w4"}),
        (gpt2, {"bits": 3, "overrides": {"mlp": {"bits": 8, "group_size": -1}, "h.0": {"skip": True}}}),
        (llama, {}),
        (llama, {"bits": 5, "group_size": 20}),
    ],
)
def test_comes_back_to_the_same_bits(make, options, tmp_path):
    model = quantized(make, **options)
    model.save_pretrained(tmp_path / "first")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    ours, theirs = ({n: type(m) for n, m in each.named_modules()} for each in (model, loaded))
    assert ours == theirs
    loaded.save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_vision_transformer_with_its_convolution(tmp_path):
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    model = quantized(vit, [images])
    assert any(isinstance(module, gptq.QuantizedConv2d) for module in model.modules())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, images), logits(model, images))


def test_loads_in_a_process_of_its_own(saved, root):
    model, folder = saved
    source = (
        "import sys, torch, transformers, gptq.huggingface\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)\n"
        "print(ids.tolist())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root / "ops" / "python")}
    done = subprocess.run([sys.executable, "-c", source, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)
    assert json.loads(done.stdout) == expected.tolist()


def test_other_dtypes_and_the_base_model(saved):
    model, folder = saved
    half = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    layer = half.transformer.h[0].mlp.c_fc
    assert (layer.scales.dtype, layer.bias.dtype, layer.weight.dtype) == (torch.float16, *[torch.bfloat16] * 2)
    assert layer.weight.isnan().all()
    # bfloat16 has 8 bits, and the errors of some tens of roundings add up like a random walk.
    difference = (logits(half) - logits(model)).abs().max() / logits(model).abs().max()
    assert 0 < difference < 0.05
    base = transformers.AutoModel.from_pretrained(folder)
    assert isinstance(base.h[0].mlp.c_fc, gptq.QuantizedLinear)
    ids = token_ids(2, 30)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.transformer(ids).last_hidden_state)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False, "group_size": 32},
        {"bits": 3, "group_size": 64, "lm_head": "keep"},
        {"bits": 8, "group_size": -1, "lm_head": "w4"},
    ],
)
def test_the_driver_reads_it_and_is_read(run_driver, demo_model, text, tmp_path, shown, options):
    model = transformers.GPT2LMHeadModel.from_pretrained(demo_model, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(demo_model / "tokenizer.json"))
    gptq.quantize(model, mode="rtn", progress=False, **options)
    model.save_pretrained(tmp_path / "python")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        shutil.copy2(demo_model / name, tmp_path / "python" / name)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "symmetric"]
    if not options.get("symmetric", True):
        flags.append("--asymmetric")
    assert run_driver("quantize", demo_model, "-o", tmp_path / "driver", "--mode", "rtn", *flags).returncode == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "driver", dtype=torch.float32)
    ids = torch.tensor([tokenizer(text[1].read_text()[:2000])["input_ids"][:250]])
    assert torch.equal(logits(loaded, ids), logits(model, ids))

    sample = tmp_path / "sample.txt"
    sample.write_text(text[1].read_text()[:2000])
    tokens = torch.tensor([tokenizer(sample.read_text())["input_ids"]])
    scored = tokens[:, : model.config.n_positions]
    loss = torch.nn.functional.cross_entropy(logits(model, scored)[0, :-1].double(), scored[0, 1:])
    report = tmp_path / "eval.json"
    scoring = ["--max-tokens", str(scored.shape[1]), "--window", str(scored.shape[1]), "--json", report]
    done = run_driver("eval", tmp_path / "python", "--text", sample, *scoring)
    assert done.returncode == 0, done.stderr
    perplexity = json.loads(report.read_text())["perplexity"]["baseline"]
    # Attention and gelu round otherwise in the driver.
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    line = ", ".join(f"{name}={value!r}" for name, value in options.items())
    shown("libgptq", "save_pretrained", line, "gptq", f"{math.exp(loss):.3f} → {perplexity:.3f}")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "python")
    assert torch.equal(logits(again, ids), logits(model, ids))
    shown("libgptq", "save_pretrained", line, "transformers", "same bits")


class TestMalformed:
    @pytest.fixture
    def broken(self, saved, tmp_path):
        """Return a copy to break."""
        return shutil.copytree(saved[1], tmp_path / "broken")

    def change(self, folder, change):
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    def test_another_format(self, broken):
        self.change(broken, lambda settings: settings.update(version=7))
        with pytest.raises(ValueError, match="version must be 1, got 7"):
            transformers.AutoModelForCausalLM.from_pretrained(broken)

    @pytest.mark.parametrize("leaf", ["packed", "scales"])
    def test_a_missing_tensor(self, broken, leaf):
        state = load_file(broken / "model.safetensors")
        del state[f"transformer.h.1.mlp.c_fc.{leaf}"]
        save_file(state, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"transformer\.h\.1\.mlp\.c_fc\.{leaf} is missing in the checkpoint"):
            transformers.AutoModelForCausalLM.from_pretrained(broken)

    def test_bits_that_the_tensors_do_not_have(self, broken):
        self.change(broken, lambda settings: settings["modules"]["transformer.h.1.mlp.c_fc"].update(bits=8))
        with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.packed must be U8 .*128\], got U8 .*64\]"):
            transformers.AutoModelForCausalLM.from_pretrained(broken)

    def test_another_dtype(self, broken):
        state = load_file(broken / "model.safetensors")
        state["transformer.h.1.mlp.c_fc.packed"] = state["transformer.h.1.mlp.c_fc.packed"].int()
        save_file(state, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.packed must be U8 .*, got I32 "):
            transformers.AutoModelForCausalLM.from_pretrained(broken)

    def test_a_path_that_is_no_linear(self, broken):
        state = load_file(broken / "model.safetensors")
        for leaf in ("packed", "scales"):
            state[f"transformer.h.1.ln_1.{leaf}"] = state[f"transformer.h.1.mlp.c_fc.{leaf}"].clone()
        save_file(state, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"h\.1\.ln_1 must be a linear or a convolution.*is LayerNorm"):
            transformers.AutoModelForCausalLM.from_pretrained(broken)


def test_a_model_is_not_quantized_by_from_pretrained(tmp_path):
    gpt2().save_pretrained(tmp_path)
    config = gptq.huggingface.LibgptqConfig()
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_other_models_are_left_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    gptq.quantize(model, mode="rtn", progress=False)
    assert not hasattr(model, "hf_quantizer")
