"""W ~ Q + L1 L2: any quantizer, corrected by a low-rank part (LQ-LoRA, arXiv:2311.12023, Algorithm 1).

    minimise  sum F * (W - Q - L1 L2)^2   over codes Q and factors L1 [out, rank], L2 [rank, in]

by turns: the factors are the Fisher-weighted truncated SVD of W - Q (row and column means of F), Q is the
quantizer's answer for W - L1 L2. Unlike the reference code the first iterate is plain Q, the quantizer
sees F too, the factors are rounded as they will be stored, and the best iterate is kept instead of the
last; so the error is never above the one without the low-rank part.
"""

from dataclasses import dataclass, replace

from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.base import AbstractQuantizer
from quantizers.format import LOW_RANK_DTYPE, StorageFormat
from quantizers.quantized import LowRank, QuantizedTensor
from quantizers.statistics import LayerStatistics, weighted_error
from solvers.low_rank import truncated_svd, two_sided_svd

LEAST_GAIN = 1e-3  # relative; an iteration that gains less is the last


@dataclass(frozen=True)
class LowRankPlus(AbstractQuantizer):
    """`quantizer` plus factors of rank `rank`, by at most `max_iterations` alternations.

    Stored: what `quantizer` stores, and (out + in) * rank numbers of 16 bits.
    """

    quantizer: AbstractQuantizer
    rank: int
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
        return replace(self.quantizer.format, rank=self.rank)

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
        nothing = LowRank(
            weight.new_zeros(weight.shape[0], self.rank, dtype=LOW_RANK_DTYPE),
            weight.new_zeros(self.rank, weight.shape[1], dtype=LOW_RANK_DTYPE),
        )
        best = quantized.with_low_rank(nothing)
        best_error = weighted_error(weight - quantized.dequantize(), statistics)
        for _ in range(self.max_iterations):
            if best_error == 0:
                break
            low_rank = fit_low_rank(weight - quantized.dequantize(), statistics, self.rank)
            corrected = quantized.with_low_rank(low_rank)
            error = weighted_error(weight - corrected.dequantize(), statistics)
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


def fit_low_rank(residual: Float32[Tensor, "out in"], statistics: LayerStatistics | None, rank: int) -> LowRank:
    """Factors of `residual`, weighted with the row and column means of the Fisher, rounded as stored."""
    if statistics is None:
        factors = truncated_svd(residual, rank)
    else:
        factors = two_sided_svd(residual, statistics.row_scale, statistics.column_scale, rank)
    return LowRank(factors.out.to(LOW_RANK_DTYPE).contiguous(), factors.into.to(LOW_RANK_DTYPE).contiguous())
