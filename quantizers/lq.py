"""W ~ Q + L1 L2: any quantizer, corrected by a low-rank part (LQ-LoRA, arXiv:2311.12023, Algorithm 1).

    minimise  sum F * (W - Q - L1 L2)^2   over codes Q and factors L1 [out, rank], L2 [rank, in]

by turns: the factors are the Fisher-weighted truncated SVD of W - Q (row and column means of F), Q is the
quantizer's answer for W - L1 L2. Unlike the reference code the first iterate is plain Q, the quantizer
sees F too, the factors are rounded as they will be stored, and the best iterate is kept instead of the
last; so the error is never above the one without the low-rank part.

Where errors are passed on while rounding, one turn is all: the factors take up what was rounded last, and another
rounding leaves as much there again.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.base import AbstractQuantizer
from quantizers.curvature import lower_factor
from quantizers.factor_refit import ROUNDS, refit_factors
from quantizers.factors import FactorFormat
from quantizers.format import StorageFormat
from quantizers.quantized import LowRank, QuantizedTensor
from quantizers.statistics import LayerStatistics, weighted_error
from solvers.whitening import Factor

LOW_RANK_SECONDS = 1.2  # for a million weights: the alternations
LEAST_GAIN = 1e-3  # relative; an iteration that gains less is the last


@dataclass(frozen=True)
class LowRankPlus(AbstractQuantizer):
    """`quantizer` plus factors of rank `rank`, by at most `max_iterations` alternations.

    Stored: what `quantizer` stores, and (out + in) * rank numbers of `factor_bits`, see factors.py.
    """

    quantizer: AbstractQuantizer
    rank: int
    factor_bits: int = 16
    max_iterations: int = 4

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be at least 1 (use the quantizer alone for rank 0)")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations is {self.max_iterations}; it must be at least 1")
        if self.quantizer.format.rank:
            raise ValueError(f"{self.quantizer} has a low-rank part already; give LowRankPlus the quantizer inside it")

    @property
    def format(self) -> StorageFormat:
        """See AbstractQuantizer."""
        return replace(self.quantizer.format, rank=self.rank, factor_bits=self.factor_bits)

    def seconds_per_million(self, curved_sides: int) -> float:
        """See AbstractQuantizer."""
        return self.quantizer.seconds_per_million(curved_sides) + LOW_RANK_SECONDS

    def quantize(self, weight: Float[Tensor, "out in"], statistics: LayerStatistics | None = None) -> QuantizedTensor:
        """See AbstractQuantizer.

        Raises:
            ValueError: the rank is above min(out, in), or `weight` is not finite.
        """
        if self.rank > min(weight.shape):
            raise ValueError(
                f"rank {self.rank} for a weight of shape {tuple(weight.shape)}; it must be 1 to {min(weight.shape)}"
            )
        weight = weight.detach().float()
        quantized = self.quantizer.quantize(weight, statistics)
        nothing = fit_low_rank(torch.zeros_like(weight), None, self.rank, self.factor_bits)
        best = quantized.with_low_rank(nothing)
        best_error = weighted_error(weight - quantized.dequantize(), statistics)
        for _ in range(self.max_iterations):
            if best_error == 0:
                break
            low_rank = fit_low_rank(weight - quantized.dequantize(), statistics, self.rank, self.factor_bits)
            corrected = quantized.with_low_rank(low_rank)
            error = weighted_error(weight - corrected.dequantize(), statistics)
            if statistics is not None and statistics.input_curvature is not None:
                return corrected if error < best_error else best
            requantized = self.quantizer.quantize(weight - low_rank.product(), statistics)
            requantized_error = weighted_error(weight - requantized.dequantize() - low_rank.product(), statistics)
            if requantized_error < error:
                corrected, error = requantized.with_low_rank(low_rank), requantized_error
            gain = 1 - error / best_error
            if gain > 0:
                best, best_error = corrected, error
            if gain < LEAST_GAIN:
                break
            quantized = requantized
        return best


def fit_low_rank(
    residual: Float32[Tensor, "out in"], statistics: LayerStatistics | None, rank: int, bits: int = 16
) -> LowRank:
    """The best factors of `residual` in the metric of `statistics`, fitted as they will be stored in `bits` bits.

    A Fisher diagonal stands for its row and column means, as in the paper; Kronecker factors are whitened exactly.
    """
    rows, columns = whitening_factors(statistics)
    rounds = ROUNDS if bits < 16 else 0
    stored = refit_factors(residual, FactorFormat(bits), rank, row_factor=rows, column_factor=columns, rounds=rounds)
    return LowRank(stored.tensors, bits, rank, (residual.shape[0], residual.shape[1]))


def whitening_factors(statistics: LayerStatistics | None) -> tuple[Factor, Factor]:
    """A and B with H_O = A A^T and H_I = B B^T, as solvers/whitening.py wants them."""
    if statistics is None:
        return None, None
    if statistics.fisher_diag is not None:
        return statistics.row_scale, statistics.column_scale
    assert statistics.input_curvature is not None
    outputs = statistics.output_curvature
    return None if outputs is None else lower_factor(outputs), lower_factor(statistics.input_curvature)
