"""The packed layer computes what a dense one with its weight would, and keeps no dense weight."""

import copy

import pytest
import torch
from torch import Tensor, nn

from quantizers import (
    AbstractQuantizer,
    LloydMax,
    LowRankPlus,
    NormalFloat,
    QuantizedLinear,
    QuantizedTensor,
    TrellisCoded,
)
from tests.quantizers.helpers import ALL_QUANTIZERS, normal_weight, quantizer_id

SHAPE = (24, 100)
WITH_LOW_RANK = LowRankPlus(LloydMax(3, 32, 4), 3)
FEW = [NormalFloat(4), LloydMax(2, 16), WITH_LOW_RANK, TrellisCoded(3)]
for_few = pytest.mark.parametrize("quantizer", FEW, ids=quantizer_id)
with_and_without_bias = pytest.mark.parametrize("bias", [None, normal_weight((1, 24))[0]], ids=["plain", "bias"])


def layer_and_dense(quantizer: AbstractQuantizer, bias: Tensor | None = None) -> tuple[QuantizedLinear, Tensor]:
    quantized = quantizer.quantize(normal_weight(SHAPE))
    return QuantizedLinear.from_quantized(quantized, bias), quantized.dequantize()


def inputs(*leading: int) -> Tensor:
    return torch.randn(*leading, 100, generator=torch.Generator().manual_seed(7))


@with_and_without_bias
@pytest.mark.parametrize("quantizer", ALL_QUANTIZERS, ids=quantizer_id)
def test_forward_is_the_dense_product(quantizer: AbstractQuantizer, bias: Tensor | None) -> None:
    layer, dense = layer_and_dense(quantizer, bias)
    x = inputs(5)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, bias), rtol=1e-5, atol=1e-5)


@for_few
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 4, 1), (0,), (2, 0)], ids=str)
def test_any_leading_dimensions(quantizer: AbstractQuantizer, leading: tuple[int, ...]) -> None:
    layer, dense = layer_and_dense(quantizer)
    x = inputs(*leading).requires_grad_()
    y = layer(x)
    assert y.shape == (*leading, 24)
    torch.testing.assert_close(y, nn.functional.linear(x, dense), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@with_and_without_bias
@for_few
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_half_precision_out(
    quantizer: AbstractQuantizer, dtype: torch.dtype, bias: Tensor | None
) -> None:
    layer, dense = layer_and_dense(quantizer, bias)
    x = inputs(6).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), nn.functional.linear(x.float(), dense, bias), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("quantizer", ALL_QUANTIZERS, ids=quantizer_id)
def test_the_gradient_is_the_dense_one(quantizer: AbstractQuantizer) -> None:
    bias = normal_weight((1, 24))[0]
    layer, dense = layer_and_dense(quantizer, bias)
    ours, theirs = inputs(2, 3).requires_grad_(), inputs(2, 3).requires_grad_()
    upstream = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(8))
    layer(ours).backward(upstream)
    nn.functional.linear(theirs, dense, bias).backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_the_gradient_passes_a_finite_difference_check() -> None:
    layer, _ = layer_and_dense(WITH_LOW_RANK)
    x = inputs(2).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@for_few
def test_backward_keeps_no_dense_weight(quantizer: AbstractQuantizer) -> None:
    layer, _ = layer_and_dense(quantizer)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    x = inputs(2).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = layer(x)
    assert max(saved, default=0) < SHAPE[0] * SHAPE[1] // 4
    held = [value for node in nodes_of(y) for value in vars(node).values() if isinstance(value, Tensor)]
    assert not held, "the function's context holds a tensor of its own"


def nodes_of(y: Tensor) -> list:
    """Every node of the graph behind `y` that has Python attributes."""
    found, to_visit = [], [y.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is None:
            continue
        if hasattr(node, "__dict__"):
            found.append(node)
        to_visit += [following for following, _ in node.next_functions]
    assert any(type(node).__name__.startswith("_PackedMatmul") for node in found)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast(dtype: torch.dtype) -> None:
    layer, dense = layer_and_dense(WITH_LOW_RANK)
    x = inputs(4).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y.float(), x.float() @ dense.T, rtol=0.02, atol=0.02)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype


@with_and_without_bias
@for_few
def test_the_state_is_what_the_format_lists(quantizer: AbstractQuantizer, bias: Tensor | None) -> None:
    layer, _ = layer_and_dense(quantizer, bias)
    specs = {name: (shape, dtype) for name, (shape, dtype) in quantizer.format.tensor_specs(SHAPE).items()}
    if bias is not None:
        specs["bias"] = ((24,), torch.float32)
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()} == specs
    assert layer.quantized().size_bits == quantizer.size_bits(SHAPE)
    assert "dense" not in repr(layer)
    assert quantizer.format.label in repr(layer)


@with_and_without_bias
@for_few
def test_an_empty_layer_is_filled_by_a_state_dict(quantizer: AbstractQuantizer, bias: Tensor | None) -> None:
    layer, _ = layer_and_dense(quantizer, bias)
    other = QuantizedLinear(SHAPE, quantizer.format, bias=bias is not None, dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    other.set_levels(quantizer.format.levels)
    assert torch.equal(other(inputs(3)), layer(inputs(3)))


def test_from_quantized_takes_a_copy_of_the_bias_and_shares_the_codes() -> None:
    quantized: QuantizedTensor = WITH_LOW_RANK.quantize(normal_weight(SHAPE))
    bias = torch.ones(24, dtype=torch.bfloat16, requires_grad=True)
    layer = QuantizedLinear.from_quantized(quantized, bias)
    assert layer.weight_packed.data_ptr() == quantized.plain["weight_packed"].data_ptr()
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert layer.bias.data_ptr() != bias.data_ptr()
    assert torch.equal(layer.quantized().dequantize(), quantized.dequantize())


@for_few
@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda cast: cast.__name__)
def test_casting_the_module_leaves_what_is_stored(quantizer: AbstractQuantizer, cast) -> None:
    layer, _ = layer_and_dense(quantizer, torch.ones(24))
    before = copy.deepcopy(layer)
    cast(nn.Sequential(layer))
    for name, tensor in before.named_buffers():
        assert torch.equal(layer.get_buffer(name), tensor)
        assert layer.get_buffer(name).dtype == tensor.dtype
    assert layer.bias is not None
    assert layer.bias.dtype in (torch.float16, torch.bfloat16, torch.float64)
    assert torch.equal(layer.quantized().dequantize(), before.quantized().dequantize())


def test_moving_the_module_moves_everything() -> None:
    layer, _ = layer_and_dense(WITH_LOW_RANK, torch.ones(24))
    layer.to("meta", torch.bfloat16)
    assert all(tensor.is_meta for tensor in [*layer.buffers(), *layer.parameters()])
    assert layer.weight_scale_step.dtype == torch.float32


@for_few
@pytest.mark.parametrize("num_rows", [3, 60])
def test_under_autocast_the_weight_is_decoded_in_full_and_rounded_once(
    quantizer: AbstractQuantizer, num_rows: int
) -> None:
    layer, dense = layer_and_dense(quantizer)
    x = inputs(num_rows).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    expected = x @ dense.T
    assert (y.float() - expected).norm() < 2**-7 * expected.norm()
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
