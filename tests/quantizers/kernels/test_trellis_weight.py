"""The trellis kernels against their references, and these against what is stored."""

import pytest
import torch

from quantizers import TrellisCoded, TrellisFormat
from quantizers.kernels import reference, trellis
from quantizers.kernels.trellis import dequantize_trellis, trellis_product
from quantizers.kernels.trellis_weight import TrellisWeight
from tests.quantizers.kernels.cases import assert_near, for_dtypes, inputs, quantized, quantizer_id

QUANTIZERS = [*(TrellisCoded(bits, 12) for bits in (1, 2, 3, 4, 5)), TrellisCoded(2, 10, seed=7), TrellisCoded(5, 8)]
for_trellises = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=quantizer_id)


def trellis_weight(quantizer: TrellisCoded, shape: tuple[int, int]) -> TrellisWeight:
    tensor = quantized(quantizer, shape)
    assert isinstance(tensor.format, TrellisFormat)
    return TrellisWeight.from_stored(tensor.format, shape, tensor.plain, tensor.levels)


@pytest.mark.parametrize("shape", [(1, 1), (20, 37)], ids=str)
@for_trellises
def test_dequantize(quantizer: TrellisCoded, shape: tuple[int, int]) -> None:
    weight = trellis_weight(quantizer, shape)
    found = dequantize_trellis(weight, torch.float32)
    assert_near(found, reference.dequantize_trellis(weight, torch.float32), torch.float32)
    assert_near(weight.dense(torch.float32), quantized(quantizer, shape).quantized_part(), torch.float32)


@for_trellises
def test_what_it_replaces_comes_back(quantizer: TrellisCoded) -> None:
    weight = trellis_weight(quantizer, (20, 37))
    stored = weight.stored()
    assert set(stored) == set(weight.replaces)
    assert torch.equal(stored["weight_packed"], quantized(quantizer, (20, 37)).plain["weight_packed"])


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("shape", [(1, 1), (20, 37), (70, 300)], ids=str)
@for_trellises
def test_fused_products(quantizer: TrellisCoded, shape: tuple[int, int], rows: int) -> None:
    weight = trellis_weight(quantizer, shape)
    x = inputs(rows, shape[1], torch.float16)
    assert_near(trellis_product(x, weight), reference.trellis_product(x, weight), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_fused_products_of_each_dtype(rows: int, dtype: torch.dtype) -> None:
    weight = trellis_weight(TrellisCoded(3), (20, 37))
    x = inputs(2 * rows, 74, dtype)[::2, ::2]
    assert_near(trellis_product(x, weight), reference.trellis_product(x, weight), dtype)


@pytest.mark.parametrize("rows", [1, 4])
def test_programs_share_columns(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trellis, "num_splits", lambda *_: 3)
    weight = trellis_weight(TrellisCoded(2), (5, 1100))
    x = inputs(rows, 1100, torch.bfloat16)
    assert_near(trellis_product(x, weight), reference.trellis_product(x, weight), torch.bfloat16)


@for_dtypes
@pytest.mark.parametrize("rows", [0, 1, 18])
def test_gradients_rotate_the_rows_and_not_the_weight(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = trellis_weight(TrellisCoded(3), (20, 37))
    monkeypatch.setattr(TrellisWeight, "dense", lambda *_: pytest.fail("the weight is rotated"))
    gradient = inputs(rows, 20, dtype)
    expected = (gradient.float() @ quantized(TrellisCoded(3), (20, 37)).quantized_part()).to(dtype)
    assert_near(weight.back(gradient), expected, dtype)


@for_dtypes
@pytest.mark.parametrize("rows", [0, 1, 16, 18])
def test_products_rotate_the_rows_and_not_the_weight(rows: int, dtype: torch.dtype) -> None:
    weight = trellis_weight(TrellisCoded(3), (20, 37))
    x = inputs(rows, 37, dtype)
    expected = (x.float() @ quantized(TrellisCoded(3), (20, 37)).quantized_part().T).to(dtype)
    assert_near(weight.product(x), expected, dtype)
