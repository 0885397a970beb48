"""A layer in training computes what the packed one does, gives its factors exact gradients, and keeps no weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quantizers import AbstractQuantizer, LloydMax, LowRankPlus, QuantizedLinear, TrellisCoded
from quantizers.factors import FactorFormat, dequantize_factors, quantize_factors
from quantizers.rotated_format import AbstractRotatedFormat
from quantizers.trainable import TrainableLinear, with_trained
from solvers.low_rank import Factors
from tests.quantizers.helpers import normal_weight, quantizer_id

SHAPE = (32, 112)  # whole tiles of the trellis, no whole blocks of 32
WITH_LOW_RANK = LowRankPlus(LloydMax(3, 32, 4), 3)
TRELLIS = TrellisCoded(2)
for_all = pytest.mark.parametrize("quantizer", [LloydMax(2, 16), WITH_LOW_RANK, TRELLIS], ids=quantizer_id)
for_dense = pytest.mark.parametrize("dense_dtype", [None, torch.float32], ids=["packed", "dense"])


def packed_layer(quantizer: AbstractQuantizer, bias: bool = True) -> QuantizedLinear:
    shift = normal_weight((1, 32))[0] if bias else None
    return QuantizedLinear.from_quantized(quantizer.quantize(normal_weight(SHAPE)), shift)


def inputs(*leading: int) -> Tensor:
    return torch.randn(*leading, 112, generator=torch.Generator().manual_seed(7))


def trainable(layer: QuantizedLinear, dense_dtype: torch.dtype | None) -> TrainableLinear:
    training = TrainableLinear(layer)
    if dense_dtype is not None:
        training.keep_dense(dense_dtype)
    return training


@for_dense
@for_all
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_the_packed_layer(quantizer: AbstractQuantizer, dense_dtype, bias: bool) -> None:
    """To the last bit; but a rotated weight that is kept dense was turned back, and of a packed one the inputs turn."""
    layer = packed_layer(quantizer, bias)
    found, expected = trainable(layer, dense_dtype)(inputs(2, 5)), layer(inputs(2, 5))
    is_rotated = dense_dtype is not None and isinstance(layer.format, AbstractRotatedFormat)
    torch.testing.assert_close(found, expected, rtol=1e-5 * is_rotated, atol=1e-5 * is_rotated)


def test_a_gain_that_bfloat16_does_not_know_still_counts() -> None:
    training = trainable(packed_layer(TRELLIS, bias=False), torch.bfloat16)
    assert training.weight_gain is not None
    x = inputs(200).bfloat16()
    plain = training(x).double()
    training.weight_gain.data.fill_(1.003)
    gained = training(x).double()
    assert float((gained * plain).sum() / plain.square().sum()) == pytest.approx(1.003, abs=3e-4)


@for_dense
@for_all
def test_gradients_are_those_of_the_dense_computation(quantizer: AbstractQuantizer, dense_dtype) -> None:
    layer = packed_layer(quantizer)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    training = trainable(layer, dense_dtype)
    ours, theirs = inputs(2, 3).requires_grad_(), inputs(2, 3).requires_grad_()
    upstream = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(8))
    training(ours).backward(upstream)
    quantized = layer.quantized()
    bias = layer.bias.detach().clone().requires_grad_()
    gain = torch.ones(1, requires_grad=True)
    weight = quantized.quantized_part() * gain
    expected = [(training.bias, bias), (training.weight_gain, gain)]
    if quantized.low_rank is not None:
        factors = quantized.low_rank.factors()
        out, into = factors.out.requires_grad_(), factors.into.requires_grad_()
        weight = weight + out @ into
        expected += [(training.low_rank_out, out), (training.low_rank_in, into)]
    nn.functional.linear(theirs, weight, bias).backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    for found, wanted in expected:
        assert found is not None
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-4)


@for_all
def test_autograd_saves_no_weight(quantizer: AbstractQuantizer) -> None:
    training = TrainableLinear(packed_layer(quantizer))
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        training(inputs(2).requires_grad_())
    assert max(saved, default=0) <= max(SHAPE) * 3


def test_moving_the_parameters_leaves_the_packed_layer() -> None:
    layer = packed_layer(WITH_LOW_RANK)
    before = layer.weight
    training = TrainableLinear(layer)
    with torch.no_grad():
        for factor in (training.low_rank_out, training.low_rank_in):
            assert factor is not None
            factor.add_(1)
    assert torch.equal(layer.weight, before)


def test_its_parameters_but_the_gain_are_named_like_the_stored_tensors() -> None:
    layer = packed_layer(WITH_LOW_RANK)
    names = {name for name, _ in TrainableLinear(layer).named_parameters()}
    assert names == {"low_rank_out", "low_rank_in", "bias", "weight_gain"}
    assert names - {"weight_gain"} < layer.state_dict().keys()


@for_all
@settings(max_examples=10)
@given(gain=st.floats(0.01, 100))
def test_a_gain_in_the_stored_scales_is_the_gain_of_the_layer(quantizer: AbstractQuantizer, gain: float) -> None:
    layer = packed_layer(quantizer)
    training = TrainableLinear(layer)
    assert training.weight_gain is not None
    with torch.no_grad():
        training.weight_gain.fill_(gain)
    stored = with_trained(layer.quantized(), gain=torch.tensor([gain]))
    reader = QuantizedLinear.from_quantized(stored, layer.bias)
    torch.testing.assert_close(training(inputs(3)), reader(inputs(3)), rtol=1e-4, atol=1e-4 * max(1, gain))
    assert torch.equal(stored.plain["weight_packed"], layer.quantized().plain["weight_packed"])
    assert stored.size_bits == layer.quantized().size_bits


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_factors_are_stored_in_the_bits_that_were_planned(bits: int) -> None:
    quantized = LowRankPlus(LloydMax(2, 16), 3, bits).quantize(normal_weight(SHAPE))
    factors = Factors(normal_weight((32, 3)), normal_weight((3, 112)))
    stored = with_trained(quantized, factors=factors)
    assert stored.format == quantized.format
    assert stored.size_bits == quantized.size_bits
    assert torch.equal(stored.quantized_part(), quantized.quantized_part())
    expected = dequantize_factors(quantize_factors(factors, FactorFormat(bits)), FactorFormat(bits), SHAPE, 3)
    assert stored.low_rank is not None
    assert torch.equal(stored.low_rank.product(), expected.product())


def test_nothing_trained_is_the_same_weight() -> None:
    quantized = WITH_LOW_RANK.quantize(normal_weight(SHAPE))
    assert with_trained(quantized).tensors() == quantized.tensors()


@pytest.mark.parametrize("dense_dtype", [None, torch.bfloat16], ids=["packed", "dense"])
def test_under_autocast(dense_dtype) -> None:
    layer = packed_layer(WITH_LOW_RANK)
    training = trainable(layer, dense_dtype)
    x = inputs(4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = training(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert training.low_rank_in is not None
    assert training.low_rank_in.grad is not None
