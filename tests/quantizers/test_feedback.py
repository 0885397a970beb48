"""Rounding with error feedback against the sums that define it, written out in float64; and what it is worth."""

import numpy as np
import pytest
import torch
from torch import Tensor

from quantizers import (
    AbstractQuantizer,
    AbstractRotated,
    Integer,
    IntegerFormat,
    KMeans,
    LatticeCoded,
    LayerStatistics,
    LloydMax,
    NormalFloat,
    QuantizedTensor,
    TrellisCoded,
    VariableTrellis,
    weighted_error,
)
from quantizers.blocks import spread
from quantizers.curvature import DAMPING, Triangular, factorize
from quantizers.feedback import round_with_feedback
from tests.quantizers.helpers import normal_weight, quantizer_id

STEP = 0.25


def correlated(size: int, seed: int = 0, decay: float = 0.9) -> Tensor:
    """A second moment in which neighbours go together, with coordinates of uneven size."""
    place = torch.arange(size)
    scale = torch.exp(0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed)))
    return decay ** (place[:, None] - place).abs() * scale[:, None] * scale


def unit_upper(matrix: Tensor) -> np.ndarray:
    """U of damped H = U diag(d) U^T by the schoolbook recursion from the last column."""
    rest = matrix.double().numpy().copy()
    size = len(rest)
    rest += DAMPING * np.trace(rest) / size * np.eye(size)
    upper = np.eye(size)
    for k in range(size - 1, -1, -1):
        for i in range(k):
            upper[i, k] = rest[i, k] / rest[k, k]
        pivot = rest[k, k]
        for i in range(k):
            for j in range(k):
                rest[i, j] -= pivot * upper[i, k] * upper[j, k]
    return upper


class GridRounder:
    """A TileRounder that rounds to multiples of STEP, all of a tile at one go; it remembers what was left."""

    def __init__(self) -> None:
        self.left: dict[tuple[int, int], Tensor] = {}

    def round_tiles(self, rows: Tensor, columns: Tensor, target: Tensor, right: Tensor) -> Tensor:
        values = (target / STEP).round() * STEP
        for tile, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
            assert (row, column) not in self.left  # each tile once
            self.left[row, column] = target[tile] - values[tile]
        return values


def reference(weight: np.ndarray, left: np.ndarray | None, right: np.ndarray, height: int, width: int) -> np.ndarray:
    """Q, tile by tile from the definition of the target; without `left` rows are independent."""
    num_rows, num_columns = weight.shape
    left = np.eye(num_rows) if left is None else left
    values, errors = np.zeros_like(weight), np.zeros_like(weight)
    for top in range(0, num_rows, height):
        for start in range(0, num_columns, width):
            rows, columns = range(top, min(top + height, num_rows)), range(start, min(start + width, num_columns))
            for i in rows:
                for j in columns:
                    target = weight[i, j]
                    for k in range(rows[-1] + 1):
                        for m in range(columns[-1] + 1):
                            target += left[k, i] * errors[k, m] * right[m, j]  # errors of this tile are still 0
                    values[i, j] = np.round(target / STEP) * STEP
            for i in rows:
                for j in columns:
                    errors[i, j] = weight[i, j] - values[i, j]
    return values


@pytest.mark.parametrize("two_sided", [False, True], ids=["inputs", "both"])
@pytest.mark.parametrize("tile", [(1, 1), (4, 4), (8, 8), (16, 16)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (1, 17), (17, 3), (18, 21)], ids=str)
def test_every_target_is_the_one_defined(shape: tuple[int, int], tile: tuple[int, int], two_sided: bool) -> None:
    weight = normal_weight(shape) * 20
    inputs = factorize(correlated(shape[1], 1)).in_blocks(tile[1])
    outputs = factorize(correlated(shape[0], 2)).in_blocks(tile[0]) if two_sided else None
    found = round_with_feedback(weight, outputs, inputs, tile, GridRounder())
    left = None if outputs is None else outputs.unit_upper.double().numpy()
    expected = reference(weight.double().numpy(), left, inputs.unit_upper.double().numpy(), *tile)
    np.testing.assert_array_equal(found.double().numpy(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (17, 97)], ids=str)
def test_the_loss_is_what_rounding_leaves_in_the_triangular_basis(shape: tuple[int, int]) -> None:
    weight, rounder = normal_weight(shape) * 20, GridRounder()
    outputs, inputs = factorize(correlated(shape[0], 2)), factorize(correlated(shape[1], 1))
    error = (weight - round_with_feedback(weight, outputs, inputs, (1, 1), rounder)).double()
    left = torch.tensor([[float(rounder.left[i, j]) for j in range(shape[1])] for i in range(shape[0])])
    by_pivots = float(outputs.pivots.double() @ left.double().square() @ inputs.pivots.double())
    loss = float(torch.trace(_product(outputs) @ error @ _product(inputs) @ error.T))
    assert by_pivots == pytest.approx(loss, rel=1e-4)
    assert float(left.abs().max()) <= STEP / 2 + 1e-6


def _product(factors: Triangular) -> Tensor:
    upper = factors.unit_upper.double()
    return (upper * factors.pivots.double()) @ upper.T


@pytest.mark.parametrize("two_sided", [False, True], ids=["inputs", "both"])
def test_without_correlations_rounding_is_plain(two_sided: bool) -> None:
    weight = normal_weight((5, 9)) * 20
    inputs = factorize(torch.diag(torch.rand(9, generator=torch.Generator().manual_seed(0)) + 0.1))
    outputs = Triangular.identity(5, weight.device) if two_sided else None
    found = round_with_feedback(weight, outputs, inputs, (2, 4), GridRounder())
    assert torch.equal(found, (weight / STEP).round() * STEP)


def choices_of(quantized: QuantizedTensor) -> np.ndarray:
    """What each weight's code can stand for under the stored parameters, [out, in, codes], float64."""
    form, columns = quantized.format, quantized.shape[1]
    scales = spread(form.scales(quantized.plain, quantized.shape), form.block_size, columns)[:, :, None]
    if isinstance(form, IntegerFormat):
        zeros = spread(form.zeros(quantized.plain, quantized.shape), form.block_size, columns)[:, :, None]
        return ((torch.arange(2.0**form.bits) - zeros).double() * scales.double()).numpy()
    levels = quantized.plain.get("weight_levels", quantized.levels).double()
    return (levels * scales.double()).numpy()


def in_turn(diagonal: list[float], block_size: int) -> list[int]:
    """Columns by falling curvature of their blocks, then their own; a block that is not whole comes last."""
    starts = range(0, len(diagonal) - block_size + 1, block_size)
    by_block = sorted(starts, key=lambda start: -sum(diagonal[start : start + block_size]))
    blocks = [range(start, start + block_size) for start in by_block]
    rest = range(len(diagonal) // block_size * block_size, len(diagonal))
    return [column for block in [*blocks, rest] for column in sorted(block, key=lambda column: -diagonal[column])]


@pytest.mark.parametrize("shape", [(3, 1), (2, 3), (3, 17), (2, 50)], ids=str)
@pytest.mark.parametrize(
    "quantizer", [LloydMax(3, 16, 4, 16), NormalFloat(2, 16), Integer(3, 16, 4, 16), KMeans(2, 16)], ids=quantizer_id
)
def test_codes_of_blocks_are_the_nearest_to_their_targets(quantizer: AbstractQuantizer, shape: tuple[int, int]) -> None:
    weight, curvature = normal_weight(shape), correlated(shape[1], 3)
    quantized = quantizer.quantize(weight, LayerStatistics(input_curvature=curvature))
    order = in_turn(curvature.diagonal().tolist(), 16)
    upper = unit_upper(curvature[order][:, order])
    expected = nearest_in_turn(quantized, weight, [[i] for i in range(shape[0])], np.eye(shape[0]), order, upper)
    np.testing.assert_allclose(quantized.dequantize().double().numpy(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("shape", "height"), [((1, 1), 1), ((3, 5), 3), ((17, 20), 1), ((34, 17), 2), ((32, 34), 16)])
@pytest.mark.parametrize("quantizer", [LloydMax(3, 16, 6), NormalFloat(2, 16), Integer(3, 16, 6)], ids=quantizer_id)
def test_codes_of_blocks_take_up_errors_of_other_rows(
    quantizer: AbstractQuantizer, shape: tuple[int, int], height: int
) -> None:
    weight, inputs, outputs = normal_weight(shape), correlated(shape[1], 3), correlated(shape[0], 4)
    quantized = quantizer.quantize(weight, LayerStatistics(input_curvature=inputs, output_curvature=outputs))
    rows, columns = in_turn(outputs.diagonal().tolist(), 1), in_turn(inputs.diagonal().tolist(), 16)
    left = factorize(outputs[rows][:, rows]).in_blocks(height).unit_upper.double().numpy()
    tiles = [rows[top : top + height] for top in range(0, len(rows), height)]
    expected = nearest_in_turn(quantized, weight, tiles, left, columns, unit_upper(inputs[columns][:, columns]))
    np.testing.assert_allclose(quantized.dequantize().double().numpy(), expected, rtol=1e-5, atol=1e-8)


def nearest_in_turn(
    quantized: QuantizedTensor,
    weight: Tensor,
    tiles: list[list[int]],
    left: np.ndarray,
    columns: list[int],
    right: np.ndarray,
) -> np.ndarray:
    """The values nearest to the targets under the stored parameters: tiles of rows in turn, and columns within them."""
    choices, expected = choices_of(quantized), np.zeros(weight.shape)
    errors, top = np.zeros(weight.shape), 0  # in the order of their turns
    for tile in tiles:
        for turn, j in enumerate(columns):
            for place, i in enumerate(tile, start=top):
                passed = left[:top, place] @ errors[:top, : turn + 1] + errors[place, : turn + 1]  # its own is still 0
                target = float(weight[i, j]) + passed @ right[: turn + 1, turn]
                expected[i, j] = choices[i, j, np.abs(choices[i, j] - target).argmin()]
                errors[place, turn] = float(weight[i, j]) - expected[i, j]
        top += len(tile)
    return expected


QUANTIZERS: list[AbstractQuantizer] = [
    LloydMax(3, 32, 6),
    Integer(3, 32, 6),
    KMeans(3, 32, 6),
    TrellisCoded(2),
    VariableTrellis(2.0),
    LatticeCoded(2),
]


@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if not isinstance(q, AbstractRotated)], ids=quantizer_id)
def test_the_order_of_columns_makes_no_difference(quantizer: AbstractQuantizer) -> None:
    """Of whole blocks, and of columns within them: they take turns by their curvature, wherever they stand."""
    weight, curvature = normal_weight((16, 104)), correlated(104)
    moved = torch.cat([torch.arange(32, 64), torch.arange(95, 63, -1), torch.arange(32), torch.arange(96, 104)])
    found = quantizer.quantize(weight, LayerStatistics(input_curvature=curvature))
    other = quantizer.quantize(weight[:, moved], LayerStatistics(input_curvature=curvature[moved][:, moved]))
    errors = [
        weighted_error(w - q.dequantize(), LayerStatistics(input_curvature=h))
        for w, q, h in ((weight, found, curvature), (weight[:, moved], other, curvature[moved][:, moved]))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)  # scales are rounded beside others


@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if not isinstance(q, AbstractRotated)], ids=quantizer_id)
def test_the_order_of_rows_makes_no_difference(quantizer: AbstractQuantizer) -> None:
    weight, inputs, outputs = normal_weight((48, 64)), correlated(64), correlated(48, 1)
    moved = torch.randperm(48, generator=torch.Generator().manual_seed(2))
    errors = []
    for w, h in ((weight, outputs), (weight[moved], outputs[moved][:, moved])):
        statistics = LayerStatistics(input_curvature=inputs, output_curvature=h)
        errors.append(weighted_error(w - quantizer.quantize(w, statistics).dequantize(), statistics))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)  # scales are rounded beside others


@pytest.mark.parametrize("quantizer", [q for q in QUANTIZERS if not isinstance(q, AbstractRotated)], ids=quantizer_id)
def test_a_strong_last_column_is_made_up_for(quantizer: AbstractQuantizer) -> None:
    weight, curvature = normal_weight((64, 96)), correlated(96)
    strong = torch.ones(96)
    strong[-16:] = 30.0
    curvature = curvature * strong[:, None] * strong
    statistics, back = LayerStatistics(input_curvature=curvature), torch.arange(95, -1, -1)
    there = weighted_error(weight - quantizer.quantize(weight, statistics).dequantize(), statistics)
    first = LayerStatistics(input_curvature=curvature[back][:, back])
    here = weighted_error(weight[:, back] - quantizer.quantize(weight[:, back], first).dequantize(), first)
    assert there == pytest.approx(here, rel=0.15)


def errors_with_and_without(quantizer: AbstractQuantizer, weight: Tensor, statistics: LayerStatistics) -> tuple:
    """In the metric of `statistics`; plain rounding knows its diagonal, as far as that helps."""
    diagonal = LayerStatistics(statistics.importance(len(weight)).contiguous())
    found = [quantizer.quantize(weight, known).dequantize() for known in (statistics, diagonal)]
    return tuple(weighted_error(weight - values, statistics) for values in found)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=quantizer_id)
def test_feedback_is_worth_a_third_where_inputs_go_together(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight((64, 192))
    with_it, without = errors_with_and_without(quantizer, weight, LayerStatistics(input_curvature=correlated(192)))
    assert with_it < 0.65 * without


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=quantizer_id)
def test_feedback_between_rows_comes_on_top(quantizer: AbstractQuantizer) -> None:
    weight = normal_weight((64, 96))
    inputs, outputs = correlated(96), correlated(64, 1)
    both = LayerStatistics(input_curvature=inputs, output_curvature=outputs)
    one_sided = quantizer.quantize(weight, LayerStatistics(input_curvature=inputs))
    two_sided = quantizer.quantize(weight, both)
    first = weighted_error(weight - one_sided.dequantize(), both)
    assert weighted_error(weight - two_sided.dequantize(), both) < 0.65 * first


@pytest.mark.parametrize("size", [3, 17, 97, 576])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=quantizer_id)
def test_feedback_does_no_harm_where_there_is_little_to_gain(quantizer: AbstractQuantizer, size: int) -> None:
    weight = normal_weight((32, size))
    inputs = torch.randn(4 * size + 64, size, generator=torch.Generator().manual_seed(size))
    statistics = LayerStatistics(input_curvature=inputs.T @ inputs)
    with_it, without = errors_with_and_without(quantizer, weight, statistics)
    assert with_it < 1.03 * without + 1e-12


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=quantizer_id)
@pytest.mark.parametrize("kind", ["zeros", "nan", "rank-one"])
def test_a_useless_curvature_breaks_nothing(quantizer: AbstractQuantizer, kind: str) -> None:
    weight = normal_weight((17, 40))
    vector = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    curvature = {"zeros": torch.zeros(40, 40), "nan": torch.full((40, 40), float("nan")), "rank-one": vector @ vector.T}
    found = quantizer.quantize(weight, LayerStatistics(input_curvature=curvature[kind])).dequantize()
    assert torch.isfinite(found).all()
    beside = LayerStatistics(input_curvature=correlated(17), output_curvature=curvature[kind][:17, :17])
    other = quantizer.quantize(weight[:, :17], beside).dequantize()
    assert torch.isfinite(other).all()
    if kind != "rank-one":  # no curvature: rounded as if nothing was known
        if not isinstance(quantizer, KMeans):  # it tells the better of two by the metric, which is 0 or NaN here
            alone = quantizer.quantize(weight[:, :17], LayerStatistics(input_curvature=correlated(17))).dequantize()
            torch.testing.assert_close(other, alone, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found, quantizer.quantize(weight).dequantize(), rtol=1e-5, atol=1e-7)
