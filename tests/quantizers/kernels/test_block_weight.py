"""The kernel layout of a matrix has the same meaning as what is stored, and gives it back bit for bit."""

import pytest
import torch

from quantizers import AbstractQuantizer
from quantizers.kernels import reference
from tests.quantizers.kernels.cases import QUANTIZERS, SHAPES, block_weight, for_quantizers, quantized


@pytest.mark.parametrize("shape", [*SHAPES, (16, 256)], ids=str)
@for_quantizers
def test_the_reference_is_the_stored_matrix(quantizer: AbstractQuantizer, shape: tuple[int, int]) -> None:
    tensor = quantized(quantizer, shape)
    found = reference.dequantize(block_weight(tensor), torch.float32)
    torch.testing.assert_close(found, tensor.quantized_part(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@for_quantizers
def test_what_it_replaces_comes_back(quantizer: AbstractQuantizer, shape: tuple[int, int]) -> None:
    tensor = quantized(quantizer, shape)
    weight = block_weight(tensor)
    stored = weight.stored()
    assert set(stored) == set(weight.replaces) & set(tensor.plain)
    for name, part in stored.items():
        assert torch.equal(part, tensor.plain[name])
        assert part.dtype == tensor.plain[name].dtype


@for_quantizers
def test_a_large_matrix_is_unpacked_some_rows_at_a_time(
    quantizer: AbstractQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = quantized(quantizer, (70, 129))
    at_once = block_weight(tensor)
    monkeypatch.setattr("quantizers.kernels.block_weight.CODES_AT_ONCE", 40 * 129)
    in_parts = block_weight(tensor)
    for one, other in zip(at_once.planes, in_parts.planes, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(in_parts.stored()["weight_packed"], tensor.plain["weight_packed"])


def test_the_second_level_of_the_scales_is_shared() -> None:
    tensor = quantized(QUANTIZERS[0], (5, 129))
    weight = block_weight(tensor)
    assert weight.steps.data_ptr() == tensor.plain["weight_scale_step"].data_ptr()
    assert weight.offset.data_ptr() == tensor.plain["weight_scale_offset"].data_ptr()
