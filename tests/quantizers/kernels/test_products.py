"""x Q^T + (x L2^T) L1^T by `matvec` (one row) and `matmul` (up to 16) against the reference, in the interpreter."""

import pytest
import torch
from torch import Tensor

from quantizers import AbstractQuantizer
from quantizers.kernels import matmul, matvec, reference
from quantizers.kernels.abstract_weight import KernelFactors
from quantizers.kernels.block_weight import BlockWeight
from tests.quantizers.kernels.cases import (
    QUANTIZERS,
    assert_near,
    block_weight,
    for_cases,
    for_dtypes,
    inputs,
    low_rank,
    quantized,
)

FEW = [QUANTIZERS[1], QUANTIZERS[-2]]


def by_kernel(x: Tensor, weight: BlockWeight, factors: KernelFactors | None = None) -> Tensor:
    return (matvec.matvec if len(x) == 1 else matmul.matmul)(x, weight, factors)


@pytest.mark.parametrize("rows", [1, 5])
@for_cases
def test_products(quantizer: AbstractQuantizer, shape: tuple[int, int], rows: int) -> None:
    weight = block_weight(quantized(quantizer, shape))
    x = inputs(rows, shape[1], torch.float32)
    assert_near(by_kernel(x, weight), reference.product(x, weight, None), torch.float32)


@for_dtypes
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("index", range(len(FEW)), ids=lambda index: type(FEW[index]).__name__)
def test_dtypes(index: int, rows: int, dtype: torch.dtype) -> None:
    weight = block_weight(quantized(FEW[index], (5, 300)))
    x = inputs(rows, 300, dtype)
    assert_near(by_kernel(x, weight), reference.product(x, weight, None), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("rank", "bits"), [(1, 16), (20, 16), (1, 8), (20, 8)])
def test_the_low_rank_part_is_added(rank: int, bits: int, rows: int, dtype: torch.dtype) -> None:
    shape = (140, 70)
    weight = block_weight(quantized(FEW[0], shape))
    factors = KernelFactors(low_rank(shape, rank, bits))
    x = inputs(rows, 70, dtype)
    found = by_kernel(x, weight, factors)
    assert_near(found, reference.product(x, weight, factors), dtype)
    without = reference.product(x, weight, None).float()
    assert float((found.float() - without).abs().max()) > 0.2 * float(without.abs().max())


@pytest.mark.parametrize("rows", [1, 4])
def test_programs_share_columns(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (matvec, matmul):
        monkeypatch.setattr(module, "num_splits", lambda *_: 3)
    shape = (5, 1100)
    weight, factors = block_weight(quantized(FEW[0], shape)), KernelFactors(low_rank(shape, 2, 16))
    x = inputs(rows, 1100, torch.float32)
    assert_near(by_kernel(x, weight, factors), reference.product(x, weight, factors), torch.float32)


def test_rows_may_be_spread_over_memory() -> None:
    weight = block_weight(quantized(FEW[0], (5, 129)))
    every_other = inputs(8, 258, torch.float32)[::2, ::2]
    transposed = inputs(129, 4, torch.float32).T
    for x in (every_other, transposed, every_other[:1], transposed[:1]):
        assert not x.is_contiguous() or len(x) == 1
        assert_near(by_kernel(x, weight), reference.product(x, weight, None), torch.float32)


@pytest.mark.parametrize("rows", [0, 1, 16, 17])
def test_any_number_of_rows(rows: int) -> None:
    weight, factors = block_weight(quantized(FEW[0], (5, 129))), KernelFactors(low_rank((5, 129), 2, 16))
    x = inputs(rows, 129, torch.float32)
    assert_near(weight.product(x, factors), reference.product(x, weight, factors), torch.float32)
