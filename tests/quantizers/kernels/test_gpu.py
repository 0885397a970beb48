"""The kernels compiled, on a CUDA device, against their references there. Run with `pytest -m gpu`."""

import pytest
import torch
import triton

from quantizers import AbstractQuantizer, LowRankPlus, NormalFloat, QuantizedLinear, TrellisCoded
from quantizers.embedding import QuantizedEmbedding, TiedHead
from quantizers.kernels import reference
from quantizers.kernels.abstract_weight import KernelFactors
from quantizers.kernels.dequantize import dequantize
from quantizers.kernels.matvec import matvec_kernel
from quantizers.kernels.switch import KERNELS
from quantizers.kernels.trellis import dequantize_trellis, trellis_product
from quantizers.kernels.trellis_weight import TrellisWeight
from quantizers.quantized import LowRank
from tests.quantizers.helpers import normal_weight
from tests.quantizers.kernels.cases import (
    assert_near,
    block_weight,
    for_dtypes,
    for_quantizers,
    inputs,
    low_rank,
    quantized,
)

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1), (5, 129), (700, 3000), (1024, 4096)]


def test_kernels_are_compiled_here() -> None:
    assert isinstance(matvec_kernel, triton.JITFunction), "run without TRITON_INTERPRET"


@for_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@for_quantizers
def test_dequantize(quantizer: AbstractQuantizer, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = block_weight(quantized(quantizer, shape), "cuda")
    assert_near(dequantize(weight, dtype), reference.dequantize(weight, dtype), dtype)


@for_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@for_quantizers
def test_products(quantizer: AbstractQuantizer, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = block_weight(quantized(quantizer, shape), "cuda")
    for rank, bits in [(0, 16), (1, 16), (20, 8)]:
        factors = KernelFactors(to_cuda(low_rank(shape, rank, bits))) if rank else None
        for rows in (0, 1, 2, 16, 17):
            x = inputs(rows, shape[1], dtype).cuda()
            assert_near(weight.product(x, factors), reference.product(x, weight, factors), dtype)


def to_cuda(factors: LowRank) -> LowRank:
    tensors = {name: tensor.cuda() for name, tensor in factors.tensors.items()}
    return LowRank(tensors, factors.bits, factors.rank, factors.shape)


@for_dtypes
@pytest.mark.parametrize("quantizer", [TrellisCoded(bits) for bits in (1, 2, 3, 4, 5)], ids=lambda q: q.format.label)
def test_trellis(quantizer: TrellisCoded, dtype: torch.dtype) -> None:
    tensor = quantized(quantizer, (200, 300))
    stored = {name: part.cuda() for name, part in tensor.plain.items()}
    weight = TrellisWeight.from_stored(quantizer.format, tensor.shape, stored, tensor.levels.cuda())
    on_cpu = TrellisWeight.from_stored(quantizer.format, tensor.shape, tensor.plain, tensor.levels)
    expected = reference.dequantize_trellis(on_cpu, dtype)
    assert_near(dequantize_trellis(weight, dtype).cpu(), expected, dtype)
    for rows in () if dtype == torch.float32 else (1, 2, 16):
        x = inputs(rows, 300, dtype)
        assert_near(trellis_product(x.cuda(), weight).cpu(), reference.trellis_product(x, on_cpu), dtype)


@pytest.mark.parametrize(
    "quantizer", [LowRankPlus(NormalFloat(3, 32), 4), TrellisCoded(2)], ids=lambda q: q.format.label
)
def test_a_layer_uses_them(quantizer: AbstractQuantizer) -> None:
    tensor = quantizer.quantize(normal_weight((96, 300)))
    layer = QuantizedLinear.from_quantized(tensor, None)
    state = {name: part.clone() for name, part in layer.state_dict().items()}
    layer.cuda()
    dense = tensor.dequantize()
    for rows in (1, 7, 40):
        x = inputs(rows, 300, torch.float32)
        ours = x.cuda().requires_grad_()
        y = layer(ours)
        assert_near(y.detach().cpu(), x @ dense.T, torch.bfloat16)  # torch may multiply in TF32
        y.sum().backward()
        assert_near(ours.grad.cpu(), torch.ones(rows, 96) @ dense, torch.bfloat16)
        with torch.no_grad():
            assert_near(layer(ours).cpu(), x @ dense.T, torch.bfloat16)
    assert KERNELS.failure is None
    assert layer.weight_packed is None
    for name, part in layer.cpu().state_dict().items():
        assert torch.equal(part, state[name])


def test_a_tied_head_and_its_embedding_use_them() -> None:
    tensor = NormalFloat(4).quantize(normal_weight((500, 256)))
    embedding = QuantizedEmbedding(tensor.shape, tensor.format, torch.bfloat16)
    embedding.fill(tensor)
    embedding.cuda()
    head, tokens, dense = TiedHead(embedding, None), torch.tensor([3, 499], device="cuda"), tensor.dequantize()
    before = embedding(tokens)
    for rows in (1, 7, 40):
        x = inputs(rows, 256, torch.bfloat16)
        assert_near(head(x.cuda()).cpu(), (x.float() @ dense.T).bfloat16(), torch.bfloat16)
    assert KERNELS.failure is None
    assert embedding.weight_packed is None
    assert torch.equal(embedding(tokens), before)


@pytest.mark.parametrize("quantizer", [LowRankPlus(NormalFloat(4), 4), TrellisCoded(3)], ids=lambda q: q.format.label)
def test_under_a_cuda_graph(quantizer: AbstractQuantizer) -> None:
    tensor = quantizer.quantize(normal_weight((96, 512)))
    layer = QuantizedLinear.from_quantized(tensor, None).cuda()
    x = inputs(1, 512, torch.float16).cuda()
    with torch.no_grad():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.zero_()
        graph.replay()
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
