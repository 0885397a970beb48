"""What a quantizer would lose on one matrix, without quantizing the matrix: the entries of a cost table.

Three savings, checked against real quantization by benchmarks/cost_table.py and benchmarks/prediction.py:

1. Errors of a quantizer with feedback are independent in the curvature's triangular basis (curvature.py). So its
   weighted error is that of plain rounding with the factors' pivots as weights, and no feedback need be run.
2. A sample of rows: plain rounding is tried on some rows only. Rows are drawn with probability proportional to their
   expected error, so that a few dozen give a percent or two, and they are the same for all quantizers, whose order
   then hardly depends on the draw.
3. A rotated weight looks normal, so a quantizer of it loses its known distortion times the mean square of what it
   rounds: the weight, and the errors that it takes up.

What a low-rank part wins back is the share of the whitened residual's energy that lies in its leading singular
values, from one spectrum for all ranks. Feedback leaves independent errors in the triangular basis, so normal numbers
times the roots of the pivots stand for the whitened residual. Pivots differ by orders of magnitude, since what is
rounded last has nobody left to make up for it: a few singular values may hold much of the error.
"""

import functools

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from quantizers.abstract_block_format import AbstractBlockFormat
from quantizers.base import AbstractQuantizer
from quantizers.block_rounding import BlockSides, block_sides
from quantizers.lq import LowRankPlus, whitening_factors
from quantizers.rotated import AbstractRotated
from quantizers.sides import Sides
from quantizers.statistics import LayerStatistics
from solvers.low_rank import truncated_svd, whiten_both
from solvers.whitening import Factor

LARGEST_RANK = 16  # of the first spectrum; larger ranks make another
# Share of a low-rank part's gain that is left when its factors are rounded (BENCHMARKS.md, factor bits).
KEPT_GAIN = {16: 1.0, 8: 0.999, 6: 0.995, 4: 0.97, 3: 0.92}


class ErrorEstimator:
    """Estimates for one matrix.

    Args:
        weight: [out, in], finite.
        statistics: the metric; None for the plain squared error.
        num_rows: rows to sample; a matrix with fewer is measured whole.
        seed: of the draw.
    """

    def __init__(
        self, weight: Float32[Tensor, "out in"], statistics: LayerStatistics | None, *, num_rows: int, seed: int
    ) -> None:
        self.weight, self.statistics = weight, statistics
        self._block_sides: dict[int, BlockSides] = {}
        self._importances: dict[int, Tensor] = {}
        self.has_feedback = statistics is not None and statistics.input_curvature is not None
        importance = self._importance(block_size=1)
        self.importance_sum = float(importance.sum(dtype=torch.float64))
        self.rows, self.times = sample_rows(importance.sum(dim=1) * weight.square().mean(dim=1), num_rows, seed)
        self.sampled = weight[self.rows]
        self._errors: dict[AbstractQuantizer, float] = {}
        self._sides: dict[tuple[int, tuple[int, int]], Sides] = {}
        self._captured: dict[object, Float64[Tensor, " ranks"]] = {}

    def error(self, quantizer: AbstractQuantizer) -> float:
        """The expected `weighted_error` of what `quantizer` leaves."""
        if isinstance(quantizer, LowRankPlus):
            left = 1 - KEPT_GAIN[quantizer.factor_bits] * self._captured_share(quantizer)
            return self._plain_error(quantizer.quantizer) * left
        return self._plain_error(quantizer)

    def _plain_error(self, quantizer: AbstractQuantizer) -> float:
        if quantizer not in self._errors:
            if isinstance(quantizer, AbstractRotated):
                self._errors[quantizer] = self._rotated_error(quantizer)
            else:
                self._errors[quantizer] = self._sampled_error(quantizer)
        return self._errors[quantizer]

    def _sampled_error(self, quantizer: AbstractQuantizer) -> float:
        importance = self._sampled_importance(_block_size(quantizer))
        statistics = None if self.statistics is None else LayerStatistics(fisher_diag=importance)
        residual = self.sampled - quantizer.quantize(self.sampled, statistics).dequantize()
        errors = (residual.square() * importance).sum(dim=1, dtype=torch.float64)
        return float(errors @ self.times)

    def _rotated_error(self, quantizer: AbstractRotated) -> float:
        mean_square = float(self.weight.square().mean(dtype=torch.float64))
        loss = mean_square * quantizer.loss(self._sides_of(quantizer))
        return loss if self.has_feedback else loss * self.importance_sum / self.weight.numel()

    def _sides_of(self, quantizer: AbstractRotated) -> Sides:
        key = (quantizer.format.seed, quantizer.tile)
        if key not in self._sides:
            shape = (self.weight.shape[0], self.weight.shape[1])
            self._sides[key] = quantizer.sides(shape, self.statistics, self.weight.device)
        return self._sides[key]

    def _captured_share(self, quantizer: LowRankPlus) -> float:
        """Of the whitened residual's energy, what the leading `rank` components hold."""
        plain, rank = quantizer.quantizer, quantizer.rank
        key: object = plain.format.codebook_name
        if isinstance(plain, AbstractRotated):
            key = plain = plain.representative
        if key not in self._captured or len(self._captured[key]) < rank:
            most = min(LARGEST_RANK, *self.weight.shape)
            self._captured[key] = _leading_shares(self._whitened_residual(plain), max(rank, most))
        return float(self._captured[key][rank - 1])

    def _whitened_residual(self, plain: AbstractQuantizer) -> Float32[Tensor, "out in"]:
        """A matrix with the spectrum that `plain` may be expected to leave, up to a factor."""
        learnt = self.statistics
        normal = _normal(self.weight.shape[0], self.weight.shape[1]).to(self.weight.device)
        if isinstance(plain, AbstractRotated) and self.has_feedback:
            sides = self._sides_of(plain)
            columns_weighed = sides.inputs.weigh(normal * sides.spread_out(plain.distortions(sides)).sqrt())
            return columns_weighed if sides.outputs is None else sides.outputs.weigh(columns_weighed.T).T
        if not isinstance(plain, AbstractRotated) and self.has_feedback:
            of_blocks = self._sides_of_blocks(_block_size(plain))
            errors = normal * self.weight.square().mean(dim=1, keepdim=True).sqrt()
            columns_weighed = of_blocks.inputs.factor.weigh(errors)
            outputs = of_blocks.outputs
            return columns_weighed if outputs is None else outputs.factor.weigh(columns_weighed[outputs.places].T).T
        rows, columns = self._whitening
        if isinstance(plain, AbstractRotated):
            return whiten_both(normal, rows, columns)
        return whiten_both(self.weight - plain.quantize(self.weight, learnt).dequantize(), rows, columns)

    def _sampled_importance(self, block_size: int) -> Float32[Tensor, "rows in"]:
        if block_size not in self._importances:
            self._importances[block_size] = self._importance(block_size)[self.rows].contiguous()
        return self._importances[block_size]

    def _importance(self, block_size: int) -> Float32[Tensor, "out in"]:
        """Weights of independent errors: of plain rounding, or of rounding with feedback in the triangular basis."""
        statistics = self.statistics
        if statistics is None:
            return torch.ones_like(self.weight)
        if statistics.input_curvature is None:
            return statistics.importance(len(self.weight))
        return self._sides_of_blocks(block_size).importance.expand(self.weight.shape)

    def _sides_of_blocks(self, block_size: int) -> BlockSides:
        if block_size not in self._block_sides:
            assert self.statistics is not None
            alike = next(iter(self._block_sides.values()), None)
            self._block_sides[block_size] = block_sides(self.statistics, block_size, alike)
        return self._block_sides[block_size]

    @functools.cached_property
    def _whitening(self) -> tuple[Factor, Factor]:
        return whitening_factors(self.statistics)


def _block_size(quantizer: AbstractQuantizer) -> int:
    """Columns that are rounded one after the other; 1 where nobody knows."""
    form = quantizer.format
    return form.block_size if isinstance(form, AbstractBlockFormat) else 1


def sample_rows(
    expected: Float[Tensor, " out"], num_rows: int, seed: int
) -> tuple[Int64[Tensor, " rows"], Float64[Tensor, " rows"]]:
    """Systematic sampling with probability proportional to `expected` (plus a floor for rows of zeros).

    Returns:
        Distinct row indices, and the factor by which each one's error enters the sum.
    """
    total = len(expected)
    if num_rows >= total:
        return torch.arange(total, device=expected.device), torch.ones(total).to(expected.device, torch.float64)
    share = expected.double() / expected.double().sum().clamp_min(1e-300)
    share = 0.9 * share + 0.1 / total
    share = share / share.sum()
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    points = ((torch.arange(num_rows, dtype=torch.float64) + start) / num_rows).to(expected.device)
    drawn = torch.searchsorted(share.cumsum(0), points).clamp_max(total - 1)
    rows, counts = drawn.unique(return_counts=True)
    return rows, counts / (num_rows * share[rows])


def _leading_shares(residual: Tensor, rank: int) -> Float64[Tensor, " ranks"]:
    """Share of the energy in the first 1, 2 ... `rank` singular values."""
    energy = residual.square().sum(dtype=torch.float64)
    if energy == 0:
        return torch.zeros(rank, dtype=torch.float64)
    values = truncated_svd(residual, rank).out.double().square().sum(dim=0)  # the factors share each singular value
    return (values.square().cumsum(0) / energy).clamp_max(1.0).cpu()


@functools.lru_cache(maxsize=4)
def _normal(rows: int, columns: int) -> Float32[Tensor, "rows columns"]:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
