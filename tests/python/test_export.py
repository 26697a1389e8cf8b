"""torch.export, torch.compile and AOTInductor of quantized models, and packages in the driver."""

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import refused
from test_model_parity import reference_perplexity
from tokenizers import Tokenizer

pytest.importorskip("gptq")
transformers = pytest.importorskip("transformers")
import export_aoti  # noqa: E402
from gptq import QuantizedLinear  # noqa: E402

VOCABULARY, POSITIONS = 4096, 64
PACKAGED = "4 and 8 bits, asymmetric, gathered inputs"
SHAPES = [(1, 1), (1, POSITIONS), (3, 17)]
# The last window of the text is shorter than the others.
WINDOWS = [(POSITIONS, POSITIONS), (POSITIONS, 23), (17, 17)]

# Nothing but the library is loaded before the program and the package.
LOAD = """
import sys, torch
library, program, package, ids, out = sys.argv[1:]
torch.ops.load_library(library)
program = torch.export.load(program).module()
package = torch._inductor.aoti_load_package(package)
torch.save([(program(x), package(x)) for x in torch.load(ids)], out)
"""


@pytest.fixture(scope="module", autouse=True)
def compiler_settings(tmp_path_factory):
    """Keep what inductor compiles in a folder of the test's own, and compile fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
        yield


@pytest.fixture(scope="module")
def text(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((root / "scripts" / "train_demo_model.py").read_text()[:3000])
    return path


@pytest.fixture(scope="module")
def folder(gptq, demo_model, text, tmp_path_factory):
    """Quantize a GPT-2 of one block: 4 bits with gathered inputs, 8 bits in the MLP and the head."""
    place = tmp_path_factory.mktemp("models")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, initializer_range=0.2, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(place / "float")
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        shutil.copy(demo_model / name, place / "float")
    result = gptq(
        *["quantize", place / "float", "-o", place / "int4", "--calibration", text, "--samples", "4"],
        *["--asymmetric", "--act-order", "dynamic", "--group-size", "16", "--override", "mlp:bits=8,group_size=32"],
    )
    assert result.returncode == 0, result.stderr
    return place / "int4"


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def exported(folder, root, tmp_path_factory):
    """Return the exported program and the package that the script makes of the folder."""
    place = tmp_path_factory.mktemp("exported")
    program, package = place / "program.pt2", place / "model.pt2"
    result = subprocess.run(
        [sys.executable, root / "scripts" / "export_aoti.py", folder, package, "--program", program],
        env={**os.environ, "PYTHONPATH": str(root / "ops" / "python")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in place.iterdir()) == ["model.pt2", "program.pt2"]
    return program, package


@pytest.fixture
def evaluate(gptq, text, tmp_path):
    """Return a function that gives the report of `gptq eval`."""

    def run(*arguments):
        result = gptq("eval", *arguments, "--text", text, "--json", tmp_path / "eval.json")
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / "eval.json").read_text())

    return run


def token_ids(*shape):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def assert_close(y, expected):
    # The operators are the same; where they are fused, a sum of products is blocked otherwise, which moves it by a few
    # roundings in each layer.
    assert (y - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_a_folder_of_the_driver_loads_in_python(folder, model, text, evaluate):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert [layer.bits for layer in layers.values()] == [4, 4, 8, 8, 8]
    assert layers["transformer.h.0.attn.c_attn"].input_order is not None
    assert layers["lm_head"].group_size == -1 and not model.training
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.read_text()).ids
    report = evaluate(folder, "--window", 64, "--stride", 23)
    expected, scored = reference_perplexity(model, ids, 64, 23)
    assert report["tokens_scored"] == scored
    assert report["perplexity"]["baseline"] == pytest.approx(expected, rel=1e-5)


def test_program_and_package_load_with_the_library_alone(model, exported, library_path, tmp_path, shown):
    inputs = [token_ids(*shape) for shape in SHAPES]
    torch.save(inputs, tmp_path / "ids.pt")
    command = [sys.executable, "-c", LOAD, library_path, *exported, tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([str(part) for part in command], check=True, cwd=tmp_path)
    with torch.no_grad():
        for ids, (from_program, from_package) in zip(inputs, torch.load(tmp_path / "logits.pt"), strict=True):
            expected = model(ids).logits
            assert torch.equal(from_program, expected)
            assert_close(from_package, expected)
    shown("torch.export .pt2", "export_aoti.py", PACKAGED, "torch", "same bits")
    shown("AOTInductor .pt2", "export_aoti.py", PACKAGED, "torch", "64 roundings at most")


def test_compiles_once_for_all_sizes(model):
    torch._dynamo.reset()
    compiled = torch.compile(export_aoti.Logits(model), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for i, shape in enumerate([(2, 10), (3, 17), (2, POSITIONS), (5, 2)]):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                assert_close(compiled(token_ids(*shape)), model(token_ids(*shape)).logits)


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_package_scores_as_the_folder_does(folder, exported, evaluate, shown, window, stride):
    options = ["--window", window, "--stride", stride]
    expected = evaluate(folder, *options)
    report = evaluate(exported[1], "--tokenizer", folder, *options)
    assert report["tokens_scored"] == expected["tokens_scored"]
    ours, theirs = expected["perplexity"]["baseline"], report["perplexity"]["baseline"]
    assert theirs == pytest.approx(ours, rel=1e-5)
    shown("AOTInductor .pt2", "export_aoti.py", PACKAGED, "gptq", f"{ours:.3f} → {theirs:.3f}")


def test_package_is_compared_generates_and_is_inspected(gptq, folder, exported, evaluate, tmp_path):
    report = evaluate(exported[1], "--tokenizer", folder, "--reference", folder)
    assert report["window"] == POSITIONS  # which the package tells
    assert report["top1_agreement"]["quantized"] == pytest.approx(1, abs=0.01)
    answers = []
    for options in ([folder], [exported[1], "--tokenizer", folder]):
        result = gptq("generate", *options, "--prompt", "import os", "--max-new-tokens", 8)
        assert result.returncode == 0, result.stderr
        answers.append(result.stdout)
    assert answers[0] == answers[1]
    result = gptq("inspect", exported[1], "--json", tmp_path / "inspect.json")
    assert result.returncode == 0, result.stderr
    inspected = json.loads((tmp_path / "inspect.json").read_text())
    assert inspected["kind"] == "AOTInductor package"
    assert inspected["metadata"]["torch_version"] == torch.__version__


def rewritten(package, path, metadata=None, model="model"):
    """Copy a package with other metadata or another name of the model."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as copy:
        for entry in source.infolist():
            data = source.read(entry)
            if metadata and entry.filename.endswith("_metadata.json"):
                data = json.dumps({**json.loads(data), **metadata})
            copy.writestr(entry.filename.replace("/aotinductor/model/", f"/aotinductor/{model}/"), data)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"AOTI_DEVICE_KEY": "cuda"}}, 'must be compiled for cpu, is compiled for "cuda"'),
        ({"metadata": {"AOTI_MACHINE": "z80"}}, f'must be compiled for {platform.machine()}, is compiled for "z80"'),
        ({"metadata": {"torch_version": "1.13.1"}}, r'compiled by torch \d\.\d+\.\*, is compiled by torch "1.13.1"'),
        ({"metadata": {"context_length": "-3"}}, r'context_length must be a number in 1\.\.999999999, got "-3"'),
        ({"metadata": {"vocab_size": "100"}}, r"input_ids must be in 0\.\.99, the model's vocabulary, got \d+ to \d+"),
        ({"metadata": {"AOTI_PLATFORM": 3}}, '"AOTI_PLATFORM" must be a string, got 3'),
        ({"model": "other"}, r'must hold a model named "model", holds \["other"\]'),
    ],
)
def test_package_for_another_place_is_refused(gptq, folder, exported, text, tmp_path, change, message):
    package = rewritten(exported[1], tmp_path / "changed.pt2", **change)
    result = gptq("eval", package, "--tokenizer", folder, "--text", text, "--window", POSITIONS)
    refused(result, saying=message)


@pytest.mark.parametrize("command", ["eval", "generate", "quantize", "inspect"])
def test_what_is_no_package_is_refused(gptq, folder, exported, text, tmp_path, command):
    options = {
        "eval": ["--tokenizer", folder, "--text", text],
        "generate": ["--tokenizer", folder, "--prompt", "import"],
        "quantize": ["--tokenizer", folder, "--calibration", text, "-o", tmp_path / "out.pt"],
        "inspect": [],
    }[command]
    program, package = exported
    not_compiled = "must not be compiled or exported" if command == "quantize" else "is a program of torch.export.save"
    refused(gptq(command, program, *options), saying=not_compiled)
    if command == "quantize":
        refused(gptq(command, package, *options), saying="must not be compiled or exported; quantize the model")
    cut = tmp_path / "cut.pt2"
    cut.write_bytes(package.read_bytes()[:-1000])
    refused(gptq(command, cut, *options), saying="not a TorchScript file: .*failed reading zip archive")
    noise = tmp_path / "noise.pt2"
    noise.write_bytes(bytes(range(256)) * 40)
    refused(gptq(command, noise, *options), saying="or an AOTInductor package, is none")
    assert not (tmp_path / "out.pt").exists()
