"""The kernel against its reference, in the interpreter."""

import pytest
import torch

from quantizers import AbstractQuantizer
from quantizers.kernels import reference
from quantizers.kernels.dequantize import dequantize
from tests.quantizers.kernels.cases import (
    QUANTIZERS,
    assert_near,
    block_weight,
    for_cases,
    for_dtypes,
    quantized,
)


@for_cases
def test_dequantize(quantizer: AbstractQuantizer, shape: tuple[int, int]) -> None:
    weight = block_weight(quantized(quantizer, shape))
    assert_near(dequantize(weight, torch.float32), reference.dequantize(weight, torch.float32), torch.float32)


@for_dtypes
def test_dtypes(dtype: torch.dtype) -> None:
    weight = block_weight(quantized(QUANTIZERS[1], (5, 129)))
    assert_near(dequantize(weight, dtype), reference.dequantize(weight, dtype), dtype)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", [type(QUANTIZERS[0]), type(QUANTIZERS[-1])], ids=lambda kind: kind.__name__)
def test_block_sizes(kind: type, block_size: int) -> None:
    weight = block_weight(quantized(kind(4, block_size, 6, 16), (3, 300)))
    assert_near(dequantize(weight, torch.float32), reference.dequantize(weight, torch.float32), torch.float32)
