"""The quantizer on tensors of a CUDA device; skipped where there is none."""

import pytest
import torch

gptq = pytest.importorskip("gptq")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

K, N = 96, 40


def layer_tensors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, K, generator=generator), torch.randn(300, K, generator=generator)


@pytest.mark.parametrize("options", [{}, {"mode": "classic"}, {"mode": "rtn"}, {"act_order": "dynamic"}])
def test_quantize_weight_gives_the_codes_of_the_cpu(options):
    weight, inputs = layer_tensors()
    hessian = 2 / len(inputs) * inputs.t() @ inputs
    on_host = gptq.quantize_weight(weight, hessian, group_size=32, **options)
    on_device = gptq.quantize_weight(weight.cuda(), hessian.cuda(), group_size=32, **options)
    for name in ("codes", "scales", "zeros", "input_order"):
        expected, found = getattr(on_host, name), getattr(on_device, name)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.is_cuda
            assert torch.equal(found.cpu(), expected)


def test_layer_gathers_on_the_device_and_writes_back():
    weight, inputs = layer_tensors()
    bias = torch.zeros(N)
    float_inputs = inputs + 0.1 * inputs.roll(1, 1)
    mask = (torch.arange(300) % 3 > 0).float()
    host = gptq.GPTQLayer(weight.clone(), bias.clone())
    host.add_batch(inputs, float_inputs, mask)
    device_weight, device_bias = weight.cuda(), bias.cuda()
    device = gptq.GPTQLayer(device_weight, device_bias)
    device.add_batch(inputs.cuda(), float_inputs.cuda(), mask.cuda())
    assert device.hessian().is_cuda
    # Two float32 sums of 200 products in another order.
    torch.testing.assert_close(device.hessian().cpu(), host.hessian(), rtol=1e-5, atol=1e-5)
    result = device.quantize(group_size=32, correct_bias=True, write_back=True)
    expected = host.quantize(group_size=32, correct_bias=True)
    assert result.report["loss"] == pytest.approx(expected.report["loss"], rel=1e-3)
    assert not torch.equal(device_weight.cpu(), weight)
    assert device_bias.abs().sum() > 0


def test_tensors_of_another_device_are_refused():
    weight, inputs = layer_tensors()
    with pytest.raises(RuntimeError, match="hessian must be on the device of the weight, cuda:0, got cpu"):
        gptq.quantize_weight(weight.cuda(), torch.eye(K))
    with pytest.raises(RuntimeError, match="input must be on the device of the weight, cuda:0, got cpu"):
        gptq.GPTQLayer(weight.cuda()).add_batch(inputs)
