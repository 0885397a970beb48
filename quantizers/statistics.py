"""What calibration learnt about one matrix, and the weighted error that everything else minimises."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one weight W [out, in], summed over `num_sequences` calibration sequences.

    Attributes:
        fisher_diag: [out, in] float32, the empirical Fisher diagonal: sum over sequences of the squared
            gradient of the sequence's summed loss (LQ-LoRA, arXiv:2311.12023, section 3.2).
        input_second_moment: [in, in] float32, sum over tokens of x x^T, or None where it was not collected.
        num_sequences: sequences summed over.
        num_tokens: tokens summed over.
    """

    fisher_diag: Float32[Tensor, "out in"]
    input_second_moment: Float32[Tensor, "in in"] | None
    num_sequences: int
    num_tokens: int

    def to(self, device: str) -> "LayerStatistics":
        """The same statistics on another device."""
        moment = self.input_second_moment
        return LayerStatistics(
            self.fisher_diag.to(device),
            None if moment is None else moment.to(device),
            self.num_sequences,
            self.num_tokens,
        )

    @property
    def row_scale(self) -> Float32[Tensor, " out"]:
        """sqrt of the Fisher's row means: D_row of LQ-LoRA, floored so that it can be divided by."""
        return _floored_sqrt(self.fisher_diag.mean(dim=1))

    @property
    def column_scale(self) -> Float32[Tensor, " in"]:
        """sqrt of the Fisher's column means: D_col of LQ-LoRA, floored so that it can be divided by."""
        return _floored_sqrt(self.fisher_diag.mean(dim=0))


def weighted_error(residual: Float[Tensor, "out in"], statistics: LayerStatistics | None) -> float:
    """sum of F * residual**2 in float64, with F = 1 without statistics (LQ-LoRA eq. 5, squared)."""
    squared = residual.float().square()
    if statistics is not None:
        squared = squared * statistics.fisher_diag
    return float(squared.sum(dtype=torch.float64))


def _floored_sqrt(means: Tensor) -> Tensor:
    """Dead rows and columns get a thousandth of the mean weight instead of zero; all-dead ones weigh 1."""
    scale = means.clamp_min(0).sqrt()
    mean = float(scale.mean())
    return scale.clamp_min(1e-3 * mean) if mean > 0 else torch.ones_like(scale)
