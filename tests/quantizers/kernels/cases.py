"""Matrices for the kernels: every width, block size and kind of storage, shapes that divide by nothing."""

import pytest
import torch
from torch import Tensor

from quantizers import (
    AbstractBlockFormat,
    AbstractQuantizer,
    Integer,
    KMeans,
    LloydMax,
    LowRank,
    NormalFloat,
    QuantizedTensor,
)
from quantizers.factors import FactorFormat, quantize_factors
from quantizers.kernels.block_weight import BlockWeight
from solvers.low_rank import Factors
from tests.quantizers.helpers import normal_weight, quantizer_id

# bits, block_size, scale_bits, super_block
QUANTIZERS: list[AbstractQuantizer] = [
    NormalFloat(2, 16, 8, 256, "absmax"),
    NormalFloat(3, 64, 6, 7, "absmax"),
    NormalFloat(4, 64, 8, 256, "absmax"),
    LloydMax(5, 128, 5, 16, "absmax"),
    LloydMax(6, 32, 2, 256, "absmax"),
    LloydMax(8, 64, 8, 1, "absmax"),
    KMeans(3, 32, 6, 64),
    Integer(2, 32, 4, 16),
    Integer(4, 128, 8, 256),
    Integer(8, 16, 8, 256),
]
SHAPES = [(1, 1), (5, 129), (70, 600)]
# Every quantizer in a small shape, a few in the large one, as a program of the interpreter takes a third of a second.
CASES = [(q, shape) for shape in SHAPES for q in (QUANTIZERS if shape[0] < 70 else QUANTIZERS[1::3])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Relative to the largest value; a result is rounded once, a product of half precision has rounded levels as well.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}

for_quantizers = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=quantizer_id)
for_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
for_cases = pytest.mark.parametrize(
    ("quantizer", "shape"), CASES, ids=[f"{quantizer_id(quantizer)}-{shape}" for quantizer, shape in CASES]
)


def quantized(quantizer: AbstractQuantizer, shape: tuple[int, int]) -> QuantizedTensor:
    """A normal matrix, quantized."""
    return quantizer.quantize(normal_weight(shape))


def low_rank(shape: tuple[int, int], rank: int, bits: int) -> LowRank:
    """Factors whose product is as large as the matrices here."""
    out, into = normal_weight((shape[0], rank), seed=1), normal_weight((rank, shape[1]), seed=2)
    form = FactorFormat(bits)
    return LowRank(quantize_factors(Factors(out * 20, into), form), bits, rank, shape)


def block_weight(tensor: QuantizedTensor, device: str = "cpu") -> BlockWeight:
    """As the kernels read it."""
    assert isinstance(tensor.format, AbstractBlockFormat)
    stored = {name: part.to(device) for name, part in tensor.plain.items()}
    return BlockWeight.from_stored(tensor.format, tensor.shape, stored, tensor.levels.to(device))


def inputs(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Every number within the tolerance of `dtype`, relative to the largest."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    largest = float(expected.detach().float().abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=TOLERANCE[dtype] * largest)
