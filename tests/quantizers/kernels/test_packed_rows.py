"""Packed embeddings and heads with kernels, in the interpreter: the same products, rows, state and gradients."""

import pytest
import torch
from torch import nn

from quantizers import LloydMax, NormalFloat
from quantizers.base import AbstractQuantizer
from quantizers.block_format import BlockFormat
from quantizers.embedding import PackedRows, QuantizedEmbedding, QuantizedHead, TiedHead
from quantizers.kernels import block_weight
from quantizers.rows import decode_rows
from tests.quantizers.helpers import normal_weight, quantizer_id
from tests.quantizers.kernels.cases import QUANTIZERS as KINDS
from tests.quantizers.kernels.cases import assert_near, inputs, quantized

SHAPE = (70, 100)
QUANTIZERS: list[AbstractQuantizer] = [LloydMax(5, 64, 6), NormalFloat(3, 32, 5, 7, scale="absmax")]
pytestmark = pytest.mark.usefixtures("_kernels_on_the_cpu")
for_quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=quantizer_id)


def filled(module: PackedRows, quantizer: AbstractQuantizer) -> PackedRows:
    module.fill(quantizer.quantize(normal_weight(SHAPE)))
    return module


def form_of(quantizer: AbstractQuantizer) -> BlockFormat:
    assert isinstance(quantizer.format, BlockFormat)
    return quantizer.format


def uses_kernels(module: PackedRows) -> bool:
    return module.weight_packed is None


@pytest.mark.parametrize("quantizer", KINDS, ids=quantizer_id)
def test_rows_of_the_layout_are_those_of_the_matrix(quantizer: AbstractQuantizer) -> None:
    tensor = quantized(quantizer, (5, 129))
    stored = {name: part.clone() for name, part in tensor.plain.items()}
    held = block_weight.BlockWeight.from_stored(tensor.format, (5, 129), stored, tensor.levels)  # type: ignore[arg-type]
    numbers = torch.tensor([4, 0, 0, 3])
    torch.testing.assert_close(held.rows(numbers), tensor.quantized_part()[numbers], rtol=1e-6, atol=1e-7)
    with pytest.raises(IndexError):
        held.rows(torch.tensor([5]))


@for_quantizers
def test_a_head_multiplies_few_rows_by_kernels_and_many_by_runs(quantizer: AbstractQuantizer) -> None:
    head = filled(QuantizedHead(SHAPE, form_of(quantizer), torch.float32, bias=True), quantizer)
    head.bias = nn.Parameter(normal_weight((1, 70))[0], requires_grad=False)
    state, dense = {name: part.clone() for name, part in head.state_dict().items()}, head.weight
    assert not uses_kernels(head)
    for leading in ((20,), (), (3,), (2, 8), (2, 9), (0,)):
        x = torch.randn(*leading, 100, generator=torch.Generator().manual_seed(1))
        assert_near(head(x), nn.functional.linear(x, dense, head.bias), torch.float32)
    assert uses_kernels(head)
    for name, part in head.state_dict().items():
        assert torch.equal(part, state[name])
    head.to(torch.float64)
    assert not uses_kernels(head)


@for_quantizers
def test_a_tied_embedding_looks_rows_up_in_the_layout(quantizer: AbstractQuantizer) -> None:
    embedding = filled(QuantizedEmbedding(SHAPE, form_of(quantizer), torch.float32, 2.0), quantizer)
    head, tokens = TiedHead(embedding, None), torch.tensor([[3, 69], [0, 3]])  # type: ignore[arg-type]
    before, plain = embedding(tokens), embedding.quantized()
    y = head(inputs(2, 100, torch.float32))
    assert uses_kernels(embedding)
    assert_near(y, inputs(2, 100, torch.float32) @ plain.quantized_part().T, torch.float32)
    assert torch.equal(embedding(tokens), before)
    assert torch.equal(embedding.rows(tokens.view(-1)), decode_rows(plain, tokens.view(-1)))
    assert embedding(tokens[:0]).shape == (0, 2, 100)
    with pytest.raises(IndexError):
        embedding(torch.tensor([70]))


def test_gradients_come_from_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantizers.rows.WEIGHTS_AT_ONCE", 1)  # so that there are several runs
    head = filled(QuantizedHead(SHAPE, form_of(QUANTIZERS[1]), torch.float32, bias=False), QUANTIZERS[1])
    x, dense = inputs(3, 100, torch.float32).requires_grad_(), head.weight
    head(x).square().sum().backward()
    assert uses_kernels(head)
    again = x.detach().clone().requires_grad_()
    (again @ dense.T).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-3)


def test_without_kernels_it_goes_on_by_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    head = filled(QuantizedHead(SHAPE, form_of(QUANTIZERS[0]), torch.float32, bias=False), QUANTIZERS[0])
    x, dense = inputs(2, 100, torch.float32), head.weight
    assert_near(head(x), x @ dense.T, torch.float32)

    def broken(*_: object) -> None:
        raise RuntimeError("planned")

    monkeypatch.setattr(block_weight.BlockWeight, "product", broken)
    with pytest.warns(RuntimeWarning, match="planned"):
        assert_near(head(x), x @ dense.T, torch.float32)
    assert not uses_kernels(head)
