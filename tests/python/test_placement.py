"""gptq.quantize with a device: what is there when, and that the model comes home.

The CPU stands on both sides here: parts are copied as they are for a CUDA device, to memory of their own.
"""

import gptq
import pytest
import torch
from gptq import placement
from small_models import MODELS, QUIET, logits, same_codes


@pytest.fixture
def streaming(monkeypatch):
    """Copy the parts of a model although its home is the device; return the most bytes that were copied at a time."""
    most = [0]
    hold = placement.Placement._hold

    def watched(self, part, roots):
        hold(self, part, roots)
        away = self._away.values()
        assert all(entry.tensor.data_ptr() != entry.home.data_ptr() for entry in away if entry.home.numel())
        most[0] = max(most[0], sum(entry.home.nbytes for entry in away))

    monkeypatch.setattr(placement, "is_elsewhere", lambda home, device: True)
    monkeypatch.setattr(placement.Placement, "_hold", watched)
    return most


def addresses(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.data_ptr(), tensor._version) for name, tensor in tensors}


@pytest.mark.parametrize(("name", "blockwise"), [*((name, True) for name in MODELS), ("gpt2", False)])
def test_streaming_gives_the_same_model(name, blockwise, streaming):
    make, calibration = MODELS[name]
    expected, streamed = make(), make()
    gptq.quantize(expected, calibration, blockwise=blockwise, **QUIET)
    before = addresses(streamed)
    gptq.quantize(streamed, calibration, blockwise=blockwise, device="cpu", **QUIET)
    assert streaming[0] > 0
    assert same_codes(streamed, expected)
    assert torch.equal(logits(streamed, calibration[0]), logits(expected, calibration[0]))
    after = addresses(streamed)
    kept = [tensor for tensor in after if tensor in before and not tensor.endswith("bias")]
    assert kept or name == "mlp"
    assert {tensor: after[tensor][0] for tensor in kept} == {tensor: before[tensor][0] for tensor in kept}
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in streamed.modules())


def part_bytes(model):
    targets, _ = gptq.targets.find_targets(model, lambda name: gptq.targets.Grid(4, 16))
    parts = placement.find_parts(model, targets)
    return [sum({id(t): t.nbytes for t in part.tensors(part.roots)}.values()) for part in parts]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_device_holds_what_is_kept_and_one_part(name, streaming):
    make, calibration = MODELS[name]
    model = make()
    parts = sorted(part_bytes(model))
    gptq.quantize(model, calibration, device="cpu", **QUIET)
    assert 0 < streaming[0] <= parts[-1] + parts[-2]
    assert streaming[0] < 0.7 * sum(parts)


@pytest.mark.parametrize("name", MODELS)
def test_parts_make_up_the_model(name):
    model = MODELS[name][0]()
    targets, _ = gptq.targets.find_targets(model, lambda name: gptq.targets.Grid(4, 16))
    parts = placement.find_parts(model, targets)
    found = {id(tensor) for part in parts for tensor in part.tensors(part.roots)}
    assert found == {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    modules = [module for part in parts for module in (part.roots[0].modules() if part.whole else part.roots)]
    assert len(modules) == len(set(modules))


def test_an_error_brings_the_model_home(streaming):
    make, calibration = MODELS["gpt2"]
    model = make()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    before, expected = addresses(model), make()
    with pytest.raises(RuntimeError, match=r"h\.1\.mlp\.c_fc"):
        gptq.quantize(model, calibration, device="cpu", skip=r"h\.1\.mlp\.c_proj", compare=False, **QUIET)
    assert streaming[0] > 0
    assert addresses(model) == before
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.copy_(expected.transformer.h[1].mlp.c_fc.weight)
    assert torch.equal(logits(model, calibration[0]), logits(expected, calibration[0]))


def test_rounding_needs_no_calibration(streaming):
    make, _ = MODELS["gpt2"]
    expected, streamed = make(), make()
    gptq.quantize(expected, mode="rtn", **QUIET)
    gptq.quantize(streamed, mode="rtn", device="cpu", **QUIET)
    assert same_codes(streamed, expected)


def test_the_device_a_model_is_on_moves_nothing():
    model, calibration = MODELS["mlp"][0](), MODELS["mlp"][1]
    with placement.placed(model, [], torch.device("cpu")) as found:
        assert isinstance(found, placement.NoPlacement)
    gptq.quantize(model, calibration, device="cpu", **QUIET)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "device must be the CPU or a CUDA device, got 'meta'"),
        ("cuda:99", r"device must be one (of|that)"),
    ],
)
def test_devices_that_are_not_there_are_refused(device, message):
    model = MODELS["mlp"][0]()
    with pytest.raises(ValueError, match=message):
        gptq.quantize(model, MODELS["mlp"][1], device=device, **QUIET)
    assert isinstance(model[0], torch.nn.Linear)
