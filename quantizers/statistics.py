"""What calibration learnt about one matrix, and the weighted error that everything else minimises.

Three metrics, from one definition each:

    diagonal    sum F * E^2            F the Fisher diagonal (LQ-LoRA, arXiv:2311.12023, eq. 5)
    input       tr(E H_I E^T)          H_I a second moment of the input (GPTQ, arXiv:2210.17323)
    kronecker   tr(H_O E H_I E^T)      both factors of the end loss's curvature (YAQA, arXiv:2505.22988)
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float32
from torch import Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """The metric of one weight W [out, in]: `fisher_diag`, or `input_curvature` with or without the other factor.

    Attributes:
        fisher_diag: [out, in] float32, non-negative.
        input_curvature: [in, in] float32, symmetric positive semidefinite.
        output_curvature: [out, out] float32, likewise; the identity where it is None.

    Raises:
        ValueError: neither or both kinds of metric are given.
    """

    fisher_diag: Float32[Tensor, "out in"] | None = None
    input_curvature: Float32[Tensor, "in in"] | None = None
    output_curvature: Float32[Tensor, "out out"] | None = None

    def __post_init__(self) -> None:
        if (self.fisher_diag is None) == (self.input_curvature is None):
            raise ValueError("statistics need either fisher_diag or input_curvature")
        if self.output_curvature is not None and self.input_curvature is None:
            raise ValueError("output_curvature needs input_curvature beside it")

    def to(self, device: str) -> "LayerStatistics":
        """The same statistics on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return LayerStatistics(**{name: None if held is None else held.to(device) for name, held in moved.items()})

    def times(self, factor: float) -> "LayerStatistics":
        """The metric multiplied by a number."""
        if self.fisher_diag is not None:
            return LayerStatistics(fisher_diag=self.fisher_diag * factor)
        assert self.input_curvature is not None
        return LayerStatistics(input_curvature=self.input_curvature * factor, output_curvature=self.output_curvature)

    def importance(self, num_rows: int) -> Float32[Tensor, "out in"]:
        """The metric's diagonal, for a weight of `num_rows`: what each error weighs where errors are independent."""
        if self.fisher_diag is not None:
            return self.fisher_diag
        assert self.input_curvature is not None
        columns = self.input_curvature.diagonal()
        if self.output_curvature is None:
            return columns.expand(num_rows, -1)
        return self.output_curvature.diagonal()[:, None] * columns

    @property
    def row_scale(self) -> Float32[Tensor, " out"]:
        """sqrt of the Fisher's row means: D_row of LQ-LoRA, floored so that it can be divided by."""
        assert self.fisher_diag is not None
        return _floored_sqrt(self.fisher_diag.mean(dim=1))

    @property
    def column_scale(self) -> Float32[Tensor, " in"]:
        """sqrt of the Fisher's column means: D_col of LQ-LoRA, floored so that it can be divided by."""
        assert self.fisher_diag is not None
        return _floored_sqrt(self.fisher_diag.mean(dim=0))


def weighted_error(residual: Float[Tensor, "out in"], statistics: LayerStatistics | None) -> float:
    """The error W - W' = `residual` in the metric of `statistics`, summed in float64; the plain squared one if None."""
    residual = residual.float()
    if statistics is None:
        product = residual.square()
    elif statistics.fisher_diag is not None:
        product = residual.square().mul_(statistics.fisher_diag)
    else:
        assert statistics.input_curvature is not None
        outputs, wide = statistics.output_curvature, residual.double()  # float32's last digits vary from run to run
        left = wide if outputs is None else outputs.double() @ wide
        product = (left @ statistics.input_curvature.double()).mul_(wide)
    return float(product.sum(dtype=torch.float64))


def _floored_sqrt(means: Tensor) -> Tensor:
    """Dead rows and columns get a thousandth of the mean weight instead of zero; all-dead ones weigh 1."""
    scale = means.clamp_min(0).sqrt()
    mean = float(scale.mean())
    return scale.clamp_min(1e-3 * mean) if mean > 0 else torch.ones_like(scale)
