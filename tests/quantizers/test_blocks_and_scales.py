"""Blocks, the search for their scales, and the scales' own quantization."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quantizers.abstract_block_format import BITS
from quantizers.block_format import BlockFormat
from quantizers.blocks import num_blocks, spread, to_blocks
from quantizers.codebooks import lloyd_max, normal_float
from quantizers.double_quant import double_quantize
from quantizers.scale_search import nearest, search_scales
from tests.quantizers.helpers import SHAPES, normal_weight, uneven_statistics

CODEBOOKS = [normal_float, lloyd_max]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_hold_the_rows_and_zeros_after_them(shape: tuple[int, int], block_size: int) -> None:
    weight = normal_weight(shape)
    blocks = to_blocks(weight, block_size)
    rows = blocks.flatten(1)
    assert blocks.shape == (shape[0], num_blocks(shape[1], block_size), block_size)
    assert torch.equal(rows[:, : shape[1]], weight)
    assert (rows[:, shape[1] :] == 0).all()


def test_spread_repeats_each_scale_over_its_block() -> None:
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert spread(scales, 2, 3).tolist() == [[1, 1, 2], [3, 3, 4]]


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", BITS)
def test_nearest_is_the_nearest(codebook, bits: int) -> None:
    levels = codebook(bits)
    values = torch.cat([torch.linspace(-1.5, 1.5, 3001), levels, torch.tensor([1e30, -1e30])])
    distances = (values.double()[:, None] - levels.double()).abs()
    chosen = distances.gather(1, nearest(values, levels).long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, distances.amin(dim=1), rtol=1e-7, atol=1e-7)


def errors(blocks: Tensor, fisher: Tensor | None, scales: Tensor, levels: Tensor) -> Tensor:
    """Each block's sum f (w - s q)^2 with the nearest levels, in float64."""
    codes = nearest(blocks / scales.clamp_min(1e-30)[:, None], levels).long()
    squared = (blocks.double() - scales.double()[:, None] * levels.double()[codes]).square()
    return (squared if fisher is None else squared * fisher.double()).sum(dim=1)


def objective(blocks: Tensor, fisher: Tensor | None, scales: Tensor, levels: Tensor) -> float:
    return float(errors(blocks, fisher, scales, levels).sum())


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "fisher"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", BITS)
def test_searched_scales_are_never_worse_than_absmax(codebook, bits: int, seed: int, weighted: bool) -> None:
    blocks = normal_weight((200, 64), seed)
    fisher = uneven_statistics((200, 64), seed).fisher_diag if weighted else None
    levels = codebook(bits)
    searched = objective(blocks, fisher, search_scales(blocks, fisher, levels), levels)
    assert searched <= 1.001 * objective(blocks, fisher, blocks.abs().amax(dim=1), levels)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_the_search_halves_the_error_at_two_bits(codebook) -> None:
    blocks, levels = normal_weight((200, 64)), codebook(2)
    searched = objective(blocks, None, search_scales(blocks, None, levels), levels)
    assert searched < 0.6 * objective(blocks, None, blocks.abs().amax(dim=1), levels)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_comes_close_to_an_exhaustive_one(codebook, bits: int) -> None:
    blocks, levels = normal_weight((100, 64)), codebook(bits)
    largest = blocks.abs().amax(dim=1)
    trials = [errors(blocks, None, largest * multiple, levels) for multiple in torch.linspace(0.3, 1.05, 200)]
    best = float(torch.stack(trials).amin(dim=0).sum())
    assert objective(blocks, None, search_scales(blocks, None, levels), levels) <= 1.1 * best


def test_blocks_of_zeros_get_scale_zero() -> None:
    blocks = normal_weight((4, 32))
    blocks[1] = 0
    scales = search_scales(blocks, None, lloyd_max(3))
    assert scales[1] == 0
    assert (scales[[0, 2, 3]] > 0).all()


def test_a_block_without_fisher_is_searched_unweighted() -> None:
    blocks = normal_weight((3, 64))
    fisher = torch.ones(3, 64)
    fisher[1] = 0
    assert torch.equal(search_scales(blocks, fisher, lloyd_max(2)), search_scales(blocks, None, lloyd_max(2)))


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-34, 1e-28, 1e28, 1e38])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "fisher"])
def test_extreme_magnitudes_have_finite_scales(size: float, weighted: bool) -> None:
    blocks = torch.zeros(3, 16)
    blocks[1, 3], blocks[2] = size, size
    fisher = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) if weighted else None
    scales = search_scales(blocks, fisher, lloyd_max(2))
    assert torch.isfinite(scales).all()
    assert (scales >= 0).all()


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_the_search_does_not_depend_on_the_unit(codebook) -> None:
    blocks = normal_weight((50, 64))
    scales = search_scales(blocks, None, codebook(2))
    for factor in (2.0**-90, 2.0**70):
        assert torch.equal(search_scales(blocks * factor, None, codebook(2)), scales * factor)


def test_a_searched_scale_follows_the_weights() -> None:
    block = torch.full((1, 16), 0.1)
    block[0, 0] = 1.0
    only_small = torch.ones(1, 16)
    only_small[0, 0] = 1e-6
    levels = lloyd_max(2)
    scale = search_scales(block, only_small, levels)
    assert float(scale) < 0.5 < float(search_scales(block, 1 - only_small, levels))


def random_scales(num_scales: int) -> Tensor:
    return torch.rand(num_scales, generator=torch.Generator().manual_seed(num_scales)) * 0.1 + 0.01


@pytest.mark.parametrize("num_scales", [1, 16, 17, 100])
@pytest.mark.parametrize("super_block", [1, 16, 256])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_double_quantization_errs_by_half_a_step(bits: int, super_block: int, num_scales: int) -> None:
    scales = random_scales(num_scales)
    stored = double_quantize(scales, bits, super_block)
    found = stored.dequantize(bits, super_block, num_scales)
    steps = stored.steps.repeat_interleave(super_block)[:num_scales]
    assert ((found - scales).abs() <= steps / 2 + 1e-8).all()
    assert float(stored.offset) == float(scales.min())
    # the largest of each super-block keeps its value, and so does the smallest of all
    largest = [int(part.argmax()) + i * super_block for i, part in enumerate(scales.split(super_block))]
    torch.testing.assert_close(found[largest], scales[largest], rtol=1e-6, atol=0)
    assert found[scales.argmin()] == scales.min()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "super_block"), [(2, 1), (3, 16), (5, 16), (7, 256), (8, 256)])
def test_double_quantization_stores_what_the_format_says(bits: int, super_block: int, shape: tuple[int, int]) -> None:
    form = BlockFormat(4, 32, bits, super_block, "nf")
    num_scales = shape[0] * -(-shape[1] // 32)
    assert form.num_scales(shape) == num_scales
    stored = double_quantize(random_scales(num_scales), bits, super_block)
    specs = form.tensor_specs(shape)
    assert specs["weight_scale_packed"] == (tuple(stored.packed.shape), stored.packed.dtype)
    assert specs["weight_scale_step"] == (tuple(stored.steps.shape), stored.steps.dtype)
    assert specs["weight_scale_offset"] == (tuple(stored.offset.shape), stored.offset.dtype)


def test_equal_scales_and_zeros_survive_exactly() -> None:
    same = torch.full((40,), 0.3)
    assert torch.equal(double_quantize(same, 4, 16).dequantize(4, 16, 40), same)
    with_zeros = random_scales(40)
    with_zeros[::7] = 0
    found = double_quantize(with_zeros, 4, 16).dequantize(4, 16, 40)
    assert (found[::7] == 0).all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("codebook", "fp4"),
        ("bits", 7),
        ("bits", 1),
        ("block_size", 48),
        ("scale_bits", 1),
        ("scale_bits", 9),
        ("super_block", 0),
        ("rank", -1),
    ],
)
def test_a_setting_out_of_range_is_named(setting: str, value: object) -> None:
    good: dict[str, Any] = {
        "codebook": "nf",
        "bits": 4,
        "block_size": 64,
        "scale_bits": 8,
        "super_block": 256,
        "rank": 0,
    }
    with pytest.raises(ValueError, match=f"{setting} is {value!r}"):
        BlockFormat(**good | {setting: value})
