"""The laws that every quantizer obeys."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantizers import (
    AbstractBlockFormat,
    AbstractQuantizer,
    Integer,
    IntegerFormat,
    KMeans,
    LloydMax,
    LowRankPlus,
    NormalFloat,
    QuantizedTensor,
    weighted_error,
)
from quantizers.abstract_block_format import BITS
from quantizers.block_codebook import check_scale_rule
from quantizers.blocks import num_blocks, spread, to_blocks
from quantizers.codebooks import normal_float
from quantizers.packing import unpack
from tests.quantizers.helpers import (
    ALL_QUANTIZERS,
    BLOCK_QUANTIZERS,
    CASES,
    PLAIN_QUANTIZERS,
    ROTATED_QUANTIZERS,
    Case,
    normal_weight,
    quantizer_id,
    statistics_of,
    uneven_statistics,
)

for_all = pytest.mark.parametrize("quantizer", ALL_QUANTIZERS, ids=quantizer_id)
for_all_block = pytest.mark.parametrize("quantizer", BLOCK_QUANTIZERS, ids=quantizer_id)
for_all_plain = pytest.mark.parametrize("quantizer", PLAIN_QUANTIZERS, ids=quantizer_id)

SHAPE = (24, 100)


def codes_of(quantized: QuantizedTensor) -> Tensor:
    rows, columns = quantized.shape
    return unpack(quantized.plain["weight_packed"], quantized.format.bits, rows * columns).view(rows, columns).long()


def scales_of(quantized: QuantizedTensor) -> Tensor:
    """The stored scale of each weight."""
    form, (rows, columns) = quantized.format, quantized.shape
    scales = form.scales(quantized.plain, quantized.shape)
    return spread(scales.view(rows, num_blocks(columns, form.block_size)), form.block_size, columns)


def choices_of(quantized: QuantizedTensor) -> Tensor:
    """What each weight's code can stand for, [out, in, codes]."""
    form, scales = quantized.format, scales_of(quantized)[:, :, None]
    if isinstance(form, IntegerFormat):
        zeros = spread(form.zeros(quantized.plain, quantized.shape), form.block_size, quantized.shape[1])
        return (torch.arange(2.0**form.bits) - zeros[:, :, None]) * scales
    return scales * quantized.plain.get("weight_levels", quantized.levels).float()


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert one.format == other.format
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_forecast_is_what_is_stored(case: Case, tmp_path: Path) -> None:
    weight = normal_weight(case.shape)
    quantized = case.quantizer.quantize(weight, uneven_statistics(case.shape))
    assert quantized.size_bits == case.quantizer.size_bits(case.shape)
    specs = quantized.format.tensor_specs(case.shape)
    assert {name: (tuple(t.shape), t.dtype) for name, t in quantized.tensors().items()} == specs

    path = tmp_path / "matrix.safetensors"
    save_file(quantized.tensors(), path)
    assert 8 * bytes_of_tensors(path) == quantized.size_bits
    reread = QuantizedTensor.from_tensors(quantized.format, case.shape, quantized.levels, load_file(path))
    assert reread.dequantize().shape == case.shape
    assert torch.equal(reread.dequantize(), quantized.dequantize())


def bytes_of_tensors(path: Path) -> int:
    """What follows the header of a safetensors file; counted from the file's own length."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    with safe_open(path, framework="pt") as stored:
        assert set(stored.keys()) >= {"weight_packed"}
    return path.stat().st_size - 8 - header_bytes


@for_all_block
def test_dequantize_follows_the_documented_formula(quantizer: AbstractQuantizer) -> None:
    quantized = quantizer.quantize(normal_weight(SHAPE))
    expected = choices_of(quantized).gather(2, codes_of(quantized)[:, :, None])[:, :, 0]
    if quantized.low_rank is not None:
        expected = expected + quantized.low_rank.product()
    torch.testing.assert_close(quantized.dequantize(), expected, rtol=1e-6, atol=1e-9)
    assert quantized.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(quantized.dequantize(torch.bfloat16), quantized.dequantize().bfloat16())


@for_all_plain
def test_a_weight_is_off_by_half_a_gap_at_most(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight(SHAPE)
    quantized = quantizer.quantize(weight)
    choices = choices_of(quantized)
    half_gap = choices.diff(dim=2).amax(dim=2) / 2
    clipped = (weight - choices.amax(dim=2)).clamp_min(0) + (choices.amin(dim=2) - weight).clamp_min(0)
    assert ((weight - quantized.dequantize()).abs() <= half_gap + clipped + 1e-7).all()


@for_all_plain
def test_every_code_is_the_nearest_under_its_stored_scale(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight(SHAPE)
    quantized = quantizer.quantize(weight)
    errors = (weight.double()[:, :, None] - choices_of(quantized).double()).abs()
    chosen = errors.gather(2, codes_of(quantized)[:, :, None])[:, :, 0]
    torch.testing.assert_close(chosen, errors.amin(dim=2), rtol=0, atol=1e-7)


def test_nf4_codes_are_the_published_ones() -> None:
    weight = normal_weight((32, 256))
    quantized = NormalFloat(4, scale="absmax").quantize(weight)
    scaled = weight.double() / scales_of(quantized).double()
    nearest = (scaled[:, :, None] - normal_float(4).double()).abs().argmin(dim=2)
    assert torch.equal(codes_of(quantized), nearest)


def test_nf4_with_exact_scales_is_the_published_one() -> None:
    """Every block's largest magnitude is 1/4: double quantization keeps such scales as they are."""
    blocks = to_blocks(normal_weight((32, 256)), 64)
    blocks = blocks / blocks.abs().amax(dim=2, keepdim=True) / 4
    weight = blocks.flatten(1)
    quantized = NormalFloat(4, scale="absmax").quantize(weight)
    assert (scales_of(quantized) == 0.25).all()
    distances = (4 * weight.double()[:, :, None] - normal_float(4).double()).abs()
    assert torch.equal(codes_of(quantized), distances.argmin(dim=2))
    assert torch.equal(quantized.dequantize(), normal_float(4)[distances.argmin(dim=2)] / 4)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "fisher"])
@pytest.mark.parametrize(
    "family",
    [partial(family, scale=scale) for family in (NormalFloat, LloydMax) for scale in ("search", "absmax")]
    + [Integer, KMeans],
)
@pytest.mark.parametrize("rank", [0, 2])
def test_more_bits_never_cost_more_error(family, weighted: bool, rank: int) -> None:
    weight = normal_weight((32, 128))
    statistics = uneven_statistics((32, 128)) if weighted else None
    errors = []
    for bits in BITS:
        quantizer = family(bits)
        quantizer = LowRankPlus(quantizer, rank) if rank else quantizer
        errors.append(weighted_error(weight - quantizer.quantize(weight, statistics).dequantize(), statistics))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 100


@for_all_block
def test_fisher_weights_reduce_the_fisher_weighted_error(quantizer: AbstractQuantizer) -> None:
    weight, statistics = normal_weight((64, 256)), uneven_statistics((64, 256))
    plain = weighted_error(weight - quantizer.quantize(weight).dequantize(), statistics)
    informed = weighted_error(weight - quantizer.quantize(weight, statistics).dequantize(), statistics)
    searched = not quantizer_id(quantizer).endswith("absmax")
    if searched and quantizer.format.bits <= 4 and quantizer.format.scale_bits >= 6:
        assert informed < 0.95 * plain
    elif quantizer.format.rank == 0 and not searched:
        assert informed == plain
    else:
        assert informed < 1.05 * plain


@pytest.mark.parametrize("quantizer", ROTATED_QUANTIZERS, ids=quantizer_id)
def test_a_fisher_diagonal_changes_nothing_in_a_rotated_basis(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight(SHAPE)
    assert_same(quantizer.quantize(weight, uneven_statistics(SHAPE)), quantizer.quantize(weight))


@for_all_plain
def test_blocks_of_zeros_stay_exactly_zero(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight((8, 256))
    weight[2, 128:256] = 0
    weight[5] = 0
    dequantized = quantizer.quantize(weight).dequantize()
    assert (dequantized[2, 128:] == 0).all()
    assert (dequantized[5] == 0).all()
    assert (dequantized[[0, 1, 3, 4, 6, 7]] != 0).any(dim=1).all()


@for_all
@pytest.mark.parametrize("statistics", [None, uneven_statistics(SHAPE)], ids=["plain", "fisher"])
def test_a_matrix_of_zeros_stays_zero(quantizer: AbstractQuantizer, statistics) -> None:
    assert (quantizer.quantize(torch.zeros(SHAPE), statistics).dequantize() == 0).all()


@for_all_block
def test_a_constant_matrix_is_kept(quantizer: AbstractQuantizer) -> None:
    for value in (0.37, -2.5, 1e-20, -1e20):
        weight = torch.full(SHAPE, value)
        torch.testing.assert_close(quantizer.quantize(weight).dequantize(), weight, rtol=1e-5, atol=0)


@for_all
def test_one_huge_outlier_is_kept_and_nothing_breaks(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight(SHAPE)
    weight[3, 7] = 1e4
    quantized = quantizer.quantize(weight)
    dequantized = quantized.dequantize()
    assert torch.isfinite(dequantized).all()
    has_zero = isinstance(quantized.format, AbstractBlockFormat) and 0 in quantized.levels
    if quantizer_id(quantizer).endswith("absmax") or has_zero:
        assert float(dequantized[3, 7]) == pytest.approx(1e4, rel=0.01)
    else:  # without a level at zero the search trades the outlier against its neighbours
        assert weighted_error(weight - dequantized, None) < weighted_error(weight, None)


@pytest.mark.parametrize("quantizer", PLAIN_QUANTIZERS + ROTATED_QUANTIZERS, ids=quantizer_id)
def test_quantization_does_not_depend_on_the_unit(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight(SHAPE)
    dequantized = quantizer.quantize(weight).dequantize()
    for factor in (2.0**-60, 2.0**60):
        assert torch.equal(quantizer.quantize(weight * factor).dequantize(), dequantized * factor)


@for_all
def test_a_matrix_of_almost_nothing_is_quantized(quantizer: AbstractQuantizer) -> None:
    for size in (1e-45, 1e-34):  # the first is subnormal
        weight = torch.zeros(SHAPE)
        weight[1, 2], weight[3] = size, -size
        assert (quantizer.quantize(weight).dequantize().abs() <= 2 * size).all()


@for_all
def test_non_finite_weights_are_refused(quantizer: AbstractQuantizer) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = normal_weight(SHAPE)
        weight[-1, -1] = bad
        with pytest.raises(ValueError, match="NaN or an infinity"):
            quantizer.quantize(weight)


@for_all
def test_half_precision_is_quantized_as_its_float32_values(quantizer: AbstractQuantizer) -> None:
    dtype = torch.bfloat16 if isinstance(quantizer, LowRankPlus) else torch.float16
    weight = normal_weight(SHAPE).to(dtype)
    assert_same(quantizer.quantize(weight), quantizer.quantize(weight.float()))


@for_all
def test_a_transposed_view_is_quantized_as_its_copy(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight(SHAPE[::-1]).T
    assert not weight.is_contiguous()
    assert_same(quantizer.quantize(weight), quantizer.quantize(weight.contiguous()))


@for_all
def test_the_input_is_left_as_it_was_and_the_answer_is_always_the_same(quantizer: AbstractQuantizer) -> None:
    weight, statistics = normal_weight(SHAPE), uneven_statistics(SHAPE)
    before, fisher_before = weight.clone(), statistics.fisher_diag.clone()
    random_state = torch.random.get_rng_state()
    first = quantizer.quantize(weight, statistics)
    assert torch.equal(weight, before)
    assert torch.equal(statistics.fisher_diag, fisher_before)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    torch.rand(5)
    assert_same(first, quantizer.quantize(weight, statistics))


@for_all
def test_a_trainable_weight_gives_plain_tensors(quantizer: AbstractQuantizer) -> None:
    weight = torch.nn.Parameter(normal_weight(SHAPE))
    quantized = quantizer.quantize(weight)
    assert not any(tensor.requires_grad for tensor in quantized.tensors().values())
    assert all(tensor.is_contiguous() for tensor in quantized.tensors().values())


@for_all
def test_zero_fisher_rows_and_columns_do_no_harm(quantizer: AbstractQuantizer) -> None:
    fisher = uneven_statistics(SHAPE).fisher_diag.clone()
    fisher[4], fisher[:, 9] = 0, 0
    weight = normal_weight(SHAPE)
    for statistics in (statistics_of(fisher), statistics_of(torch.zeros(SHAPE))):
        dequantized = quantizer.quantize(weight, statistics).dequantize()
        assert torch.isfinite(dequantized).all()
        assert float((dequantized - weight)[4].norm()) < float(weight[4].norm())


@pytest.mark.parametrize("family", [NormalFloat, LloydMax, Integer, KMeans])
@pytest.mark.parametrize(
    ("setting", "value"),
    [("bits", 7), ("block_size", 100), ("scale_bits", 16), ("super_block", 0)],
)
def test_a_bad_setting_is_refused_at_construction(family, setting: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{setting} is {value!r}"):
        family(**{"bits": 4, setting: value})


def test_an_unknown_scale_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="scale is 'max'; it must be one of search, absmax"):
        check_scale_rule("max")  # a quantizer's constructor calls it; here its types are checked even before


@for_all
def test_the_product_is_that_of_the_dequantized_part(quantizer: AbstractQuantizer) -> None:
    """Three rows of activations are rotated in the place of the weight, sixty are not."""
    quantized = quantizer.quantize(normal_weight(SHAPE))
    dense = quantized.quantized_part()
    for num_rows in (0, 1, 3, 60):
        for transposed, weight in ((False, dense.T), (True, dense)):
            x = torch.randn(num_rows, weight.shape[0], generator=torch.Generator().manual_seed(num_rows))
            found, half = (quantized.product(each, transposed=transposed) for each in (x, x.bfloat16()))
            torch.testing.assert_close(found, x @ weight, rtol=1e-5, atol=1e-5)
            assert half.dtype == torch.bfloat16
            torch.testing.assert_close(half.float(), x @ weight, rtol=0.03, atol=0.03 * float(dense.norm()))
