"""A layer in training computes what the packed one does, gives its factors exact gradients, and keeps no weight."""

import pytest
import torch
from torch import Tensor, nn

from quantizers import AbstractQuantizer, LloydMax, LowRankPlus, QuantizedLinear
from quantizers.trainable import TrainableLinear
from tests.quantizers.helpers import normal_weight, quantizer_id

SHAPE = (24, 100)
WITH_LOW_RANK = LowRankPlus(LloydMax(3, 32, 4), 3)
for_both = pytest.mark.parametrize("quantizer", [LloydMax(2, 16), WITH_LOW_RANK], ids=quantizer_id)
for_dense = pytest.mark.parametrize("dense_dtype", [None, torch.float32], ids=["packed", "dense"])


def packed_layer(quantizer: AbstractQuantizer, bias: bool = True) -> QuantizedLinear:
    shift = normal_weight((1, 24))[0] if bias else None
    return QuantizedLinear.from_quantized(quantizer.quantize(normal_weight(SHAPE)), shift)


def inputs(*leading: int) -> Tensor:
    return torch.randn(*leading, 100, generator=torch.Generator().manual_seed(7))


@for_dense
@for_both
@pytest.mark.parametrize("bias", [False, True])
def test_forward_equals_the_packed_layer(quantizer: AbstractQuantizer, dense_dtype, bias: bool) -> None:
    layer = packed_layer(quantizer, bias)
    assert torch.equal(TrainableLinear(layer, dense_dtype)(inputs(2, 5)), layer(inputs(2, 5)))


@for_dense
@for_both
def test_gradients_are_those_of_the_dense_computation(quantizer: AbstractQuantizer, dense_dtype) -> None:
    layer = packed_layer(quantizer)
    assert layer.bias is not None
    layer.bias.requires_grad_(True)
    training = TrainableLinear(layer, dense_dtype)
    ours, theirs = inputs(2, 3).requires_grad_(), inputs(2, 3).requires_grad_()
    upstream = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(8))
    training(ours).backward(upstream)
    quantized = layer.quantized()
    bias = layer.bias.detach().clone().requires_grad_()
    weight = quantized.quantized_part()
    expected = [(training.bias, bias)]
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


@for_both
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


def test_its_parameters_are_named_like_the_stored_tensors() -> None:
    layer = packed_layer(WITH_LOW_RANK)
    names = {name for name, _ in TrainableLinear(layer).named_parameters()}
    assert names == {"low_rank_out", "low_rank_in", "bias"}
    assert names < layer.state_dict().keys()


@pytest.mark.parametrize("dense_dtype", [None, torch.bfloat16], ids=["packed", "dense"])
def test_under_autocast(dense_dtype) -> None:
    layer = packed_layer(WITH_LOW_RANK)
    training = TrainableLinear(layer, dense_dtype)
    x = inputs(4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = training(x)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert training.low_rank_in is not None
    assert training.low_rank_in.grad is not None
