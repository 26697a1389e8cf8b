"""The float linears of calibration: which run as gptq::linear_dense, and that they compute the same."""

import gptq
import pytest
import torch
import transformers
from gptq.dense_linear import DenseLinears
from small_models import QUIET, seeded
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """The operators that are called while it is entered."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def on_onednn(self):
        return self.names.count("mkldnn::_linear_pointwise")


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")


def linear_of(kind, bias=True):
    def make():
        return nn.Linear(64, 48, bias=bias) if kind == "linear" else transformers.pytorch_utils.Conv1D(48, 64)

    return seeded(make).requires_grad_(False)


@needs_onednn
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_float32_runs_on_onednn(kind):
    module = linear_of(kind)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    with Recorder() as ops, DenseLinears():
        got = module(x)
    assert ops.on_onednn == 1
    # Two float32 sums of 65 terms each.
    weight = module.weight if kind == "linear" else module.weight.T
    size = x.abs() @ weight.abs().T + module.bias.abs()
    assert ((got - module(x)).abs() <= 2 * 65 * 6e-8 * size).all()


@needs_onednn
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_float16_runs_in_float32(kind):
    module = linear_of(kind).half()
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)).half()
    with Recorder() as ops, DenseLinears():
        got = module(x)
    assert ops.on_onednn == 1
    exact = module.float()(x.float())
    assert got.dtype == torch.float16
    assert torch.allclose(got.float(), exact, rtol=2**-11, atol=1e-6)  # one rounding


@needs_onednn
def test_what_is_something_else_is_left_to_torch():
    module = linear_of("linear", bias=False)
    x = torch.ones(40, 64)
    with Recorder() as ops, DenseLinears():
        assert torch.equal(module.double()(x.double()), x.double() @ module.weight.T)
        module.float()
        assert module(x[:1]).shape == (1, 48)
        assert torch.equal(torch.addmm(torch.ones(40, 48), x, module.weight.T, alpha=0.0), torch.ones(40, 48))
        assert functional.linear(x, weight=module.weight).shape == (40, 48)
        assert nn.Linear(64, 48)(x).requires_grad
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            module(torch.ones(40, 63))
    assert ops.on_onednn == 0


@needs_onednn
def test_quantize_runs_its_forwards_so():
    model = nn.Sequential(linear_of("linear"), nn.ReLU(), seeded(lambda: nn.Linear(48, 40)))
    seen = []

    class Watcher(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watcher():
        gptq.quantize(model, [torch.randn(64, 64)], **QUIET)
    assert functional.linear not in seen
    assert any("linear_dense" in str(func) for func in seen)
