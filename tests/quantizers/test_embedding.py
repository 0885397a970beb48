"""Packed embeddings and heads give what dense ones with the dequantized weight give, and so do their gradients."""

import copy

import pytest
import torch
from torch import nn

from quantizers import LloydMax, NormalFloat
from quantizers import rows as rows_module
from quantizers.embedding import QuantizedEmbedding, QuantizedHead, TiedEmbedding, TiedHead

SHAPE = (700, 48)


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    monkeypatch.setattr(rows_module, "WEIGHTS_AT_ONCE", 256 * 48)


@pytest.fixture
def quantized():
    return NormalFloat(4, 32, 4).quantize(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def embedding(quantized):
    module = QuantizedEmbedding(SHAPE, quantized.format, torch.float32)
    module.fill(quantized)
    return module


@pytest.mark.parametrize("tokens", [[[5, 699, 0], [5, 5, 300]], [], [[[1]]]])
def test_tokens_are_looked_up(embedding, quantized, tokens):
    tokens = torch.tensor(tokens, dtype=torch.long)
    assert torch.equal(embedding(tokens), nn.functional.embedding(tokens, quantized.dequantize()))


def test_a_scale_is_the_architectures_own(quantized):
    module = QuantizedEmbedding(SHAPE, quantized.format, torch.float32, scale=3.5)
    module.fill(quantized)
    assert torch.equal(module(torch.tensor([4])), quantized.dequantize()[[4]] * 3.5)


@pytest.mark.parametrize(("is_rounded", "factor"), [(False, 5.656854), (True, 5.65625)])
def test_a_scale_is_rounded_to_the_rows_dtype_where_the_architecture_does_that(quantized, is_rounded, factor):
    module = QuantizedEmbedding(SHAPE, quantized.format, torch.float32, 5.656854, scale_is_rounded=is_rounded)
    module.fill(quantized)
    module.bfloat16()
    assert torch.equal(module(torch.tensor([4])), quantized.dequantize(torch.bfloat16)[[4]] * factor)


@pytest.mark.parametrize("token", [-1, 700])
def test_a_token_outside_of_the_vocabulary_is_an_error(embedding, token):
    with pytest.raises(IndexError, match="out of range"):
        embedding(torch.tensor([token]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_tied", [False, True])
def test_logits_and_gradient_are_those_of_a_dense_head(embedding, quantized, dtype, with_bias, is_tied):
    bias = nn.Parameter(torch.randn(SHAPE[0])) if with_bias else None
    if is_tied:
        head = TiedHead(embedding, bias)
    else:
        head = QuantizedHead(SHAPE, quantized.format, torch.float32, bias=with_bias)
        head.fill(quantized)
        head.bias = bias
    x = torch.randn(2, 5, SHAPE[1], dtype=dtype, requires_grad=True)
    wanted = nn.functional.linear(x, quantized.dequantize(dtype), None if bias is None else bias.to(dtype))
    (gradient,) = torch.autograd.grad(wanted.float().square().sum(), x)
    y = head(x)
    assert y.dtype == dtype
    (found,) = torch.autograd.grad(y.float().square().sum(), x)
    for ours, dense in ((y, wanted), (found, gradient)):  # each number of a sum of many roundings may be further off
        error = (ours.float() - dense.float()).norm() / dense.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_under_autocast_the_product_is_in_its_dtype(embedding):
    head, x = TiedHead(embedding, None), torch.randn(3, SHAPE[1], requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = head(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_scales_keep_their_precision_when_the_network_is_cast(embedding, quantized):
    embedding.to(torch.bfloat16)
    assert embedding(torch.tensor([3])).dtype == torch.bfloat16
    assert torch.equal(embedding.quantized().dequantize(), quantized.dequantize())


def test_tied_modules_store_nothing_and_survive_a_copy(embedding):
    network = nn.ModuleDict({"shared": embedding, "other": TiedEmbedding(embedding), "head": TiedHead(embedding, None)})
    assert {name.partition(".")[0] for name in network.state_dict()} == {"shared"}
    twin = copy.deepcopy(network)
    twin["shared"].fill(LloydMax(4, 32, 4).quantize(torch.zeros(SHAPE)))
    assert twin["head"].weight.abs().max() == 0
    assert twin["other"](torch.tensor([1])).abs().max() == 0
    assert network["head"].weight.abs().max() > 0


def test_an_empty_one_on_meta_has_a_weight_of_its_shape(quantized):
    with torch.device("meta"):
        module = QuantizedEmbedding(SHAPE, quantized.format, torch.bfloat16)
    assert (module.weight.shape, module.weight.dtype, module.weight.device.type) == (SHAPE, torch.bfloat16, "meta")
