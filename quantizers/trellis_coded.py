"""Trellis-coded quantization of the rotated weight, with error feedback where the curvature is known (QTIP,
arXiv:2406.11235, with the two-sided feedback of YAQA, arXiv:2505.22988).

Per weight the trellis comes within a few percent of the best that any code of its rate can do, where a scalar
codebook loses a quarter of a bit; the rotation (incoherence processing, QuIP#, arXiv:2402.04396) makes
weights normal, as the trellis expects them, and leaves no outliers.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from quantizers.base import AbstractQuantizer
from quantizers.curvature import Triangular, factorize
from quantizers.feedback import round_with_feedback
from quantizers.packing import pack
from quantizers.quantized import QuantizedTensor
from quantizers.statistics import LayerStatistics
from quantizers.trellis import decode, encode
from quantizers.trellis_format import TILE, TrellisFormat, num_tiles

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class TrellisCoded(AbstractQuantizer):
    """A tail-biting path through a trellis for every 16 x 16 tile of the rotated weight.

    Attributes:
        bits: bits a weight, 1 to 5.
        state_bits: 2**state_bits states; time grows with their number, the error falls a little.
        seed: of the rotations.
    """

    bits: int
    state_bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.format  # raises where a setting is out of range

    @property
    def format(self) -> TrellisFormat:
        """See AbstractQuantizer."""
        return TrellisFormat(self.bits, self.state_bits, self.seed)

    def quantize(self, weight: Float[Tensor, "out in"], statistics: LayerStatistics | None = None) -> QuantizedTensor:
        """See AbstractQuantizer. A Fisher diagonal has no meaning in the rotated basis and is not used."""
        weight = weight.detach().float()
        if not torch.isfinite(weight).all():
            raise ValueError("the weight has a NaN or an infinity; a quantizer needs finite numbers")
        form = self.format
        rotated, shape = form.rotate(weight), (weight.shape[0], weight.shape[1])
        outputs, inputs = self.factors(shape, statistics, weight.device)
        rounder = _TrellisRounder(form, shape, _root_mean_square(rotated))
        round_with_feedback(rotated, outputs, inputs, (TILE, TILE), rounder)
        return QuantizedTensor(form, shape, rounder.plain(), form.levels.to(weight.device))

    def factors(
        self, shape: tuple[int, int], statistics: LayerStatistics | None, device: torch.device
    ) -> tuple[Triangular | None, Triangular]:
        """The curvature's factors in the rotated basis, in blocks of a tile: a tile is rounded at one go."""
        form = self.format
        if statistics is None or statistics.input_curvature is None:
            return None, Triangular.identity(shape[1], device)
        inputs = factorize(form.rotate_curvature(statistics.input_curvature, form.seed + 1)).in_blocks(TILE)
        if statistics.output_curvature is None:
            return None, inputs
        return factorize(form.rotate_curvature(statistics.output_curvature, form.seed)).in_blocks(TILE), inputs


def _root_mean_square(values: Tensor) -> Tensor:
    largest = values.abs().amax().clamp_min(TINY)  # so that no square over- or underflows
    return (values / largest).square().mean().sqrt() * largest


class _TrellisRounder:
    """A TileRounder; `plain` gives the tensors to store once every tile is rounded."""

    def __init__(self, form: TrellisFormat, shape: tuple[int, int], scale: Tensor) -> None:
        self.form, self.scale = form, scale
        self.levels = form.levels.to(scale.device)
        self.symbols = torch.zeros((*num_tiles(shape), TILE * TILE), dtype=torch.uint8, device=scale.device)

    def round_tiles(
        self,
        rows: Int64[Tensor, " tiles"],
        columns: Int64[Tensor, " tiles"],
        target: Float32[Tensor, "tiles height width"],
        right: Float32[Tensor, "tiles width width"],
    ) -> Float32[Tensor, "tiles height width"]:
        """See TileRounder; there is no feedback within a tile."""
        symbols = encode((target / self.scale.clamp_min(TINY)).reshape(-1, TILE * TILE), self.levels, self.form.bits)
        values = decode(symbols, self.levels, self.form.bits) * self.scale
        stacked = target.shape[1] // TILE  # tiles on top of one another, where rows go together
        places = rows[:, None] * stacked + torch.arange(stacked, device=rows.device)
        self.symbols[places.view(-1), columns.repeat_interleave(stacked)] = symbols
        return values.view(target.shape)

    def plain(self) -> dict[str, Tensor]:
        """The tensors of `TrellisFormat.plain_specs`."""
        return {
            "weight_packed": pack(self.symbols.view(-1), self.form.bits),
            "weight_scale": self.scale.reshape(1),
        }
