"""Every quantizer that the laws run over, a new one is a row here; the weights and statistics they see."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers import (
    AbstractBlockFormat,
    AbstractQuantizer,
    Integer,
    KMeans,
    LatticeCoded,
    LayerStatistics,
    LloydMax,
    LowRankPlus,
    NormalFloat,
    TrellisCoded,
    VariableTrellis,
)

# bits, block_size, scale_bits, super_block: every code width, block size and scale width at least once.
SETTINGS = [
    (2, 16, 8, 256),
    (2, 64, 4, 16),
    (3, 32, 6, 256),
    (3, 64, 8, 256),
    (4, 64, 8, 256),
    (4, 32, 3, 64),
    (5, 128, 5, 16),
    (6, 64, 2, 256),
    (8, 64, 8, 1),
    (8, 128, 7, 256),
]
PLAIN_QUANTIZERS: list[AbstractQuantizer] = [
    quantizer(*settings, scale)
    for quantizer in (NormalFloat, LloydMax)
    for scale, chosen in (("search", SETTINGS), ("absmax", SETTINGS[::3]))
    for settings in chosen
]
PLAIN_QUANTIZERS += [quantizer(*settings) for quantizer in (Integer, KMeans) for settings in SETTINGS[::2]]
LOW_RANK_QUANTIZERS: list[AbstractQuantizer] = [
    LowRankPlus(NormalFloat(4, scale="absmax"), 1),
    LowRankPlus(NormalFloat(3, 32, 4), 3),
    LowRankPlus(LloydMax(2), 1),
    LowRankPlus(LloydMax(2, 16, 6, 16), 3),
    LowRankPlus(LloydMax(8, 128), 2),
    LowRankPlus(Integer(3, 32, 4), 2),
    LowRankPlus(KMeans(2), 2),
    *(LowRankPlus(LloydMax(3), 3, factor_bits) for factor_bits in (8, 6, 4, 3)),
]
ROTATED_QUANTIZERS: list[AbstractQuantizer] = [
    *(TrellisCoded(bits) for bits in (1, 3)),
    TrellisCoded(2, 10, seed=7),
    *(VariableTrellis(bits) for bits in (1.0, 3.5)),
    VariableTrellis(2.5, 10, seed=7),
    LatticeCoded(3),
    LatticeCoded(2, seed=7),
]
OTHER_RATES: list[AbstractQuantizer] = [  # the laws hold for them too; what they store is looked at
    *(TrellisCoded(bits) for bits in (2, 4, 5)),
    *(VariableTrellis(bits) for bits in (2.25, 5.0)),
    *(LatticeCoded(bits) for bits in (2, 4)),
]
ROTATED_LOW_RANK_QUANTIZERS: list[AbstractQuantizer] = [
    LowRankPlus(TrellisCoded(2), 2, 8, max_iterations=1),
    LowRankPlus(VariableTrellis(2.125), 2, 4, max_iterations=1),
    LowRankPlus(LatticeCoded(3), 1, max_iterations=1),
]
BLOCK_QUANTIZERS = PLAIN_QUANTIZERS + LOW_RANK_QUANTIZERS
ALL_QUANTIZERS = BLOCK_QUANTIZERS + ROTATED_QUANTIZERS + ROTATED_LOW_RANK_QUANTIZERS

SHAPES = [(1, 1), (3, 5), (7, 64), (16, 100), (5, 129), (16, 576)]


def quantizer_id(quantizer: AbstractQuantizer) -> str:
    """Its label, and what the label does not tell."""
    plain = quantizer.quantizer if isinstance(quantizer, LowRankPlus) else quantizer
    scale = f"-{plain.scale}" if isinstance(plain, NormalFloat | LloydMax) else ""
    form = plain.format
    rest = f"-q{form.super_block}" if isinstance(form, AbstractBlockFormat) else f"-seed{form.seed}"
    return f"{quantizer.format.label}{rest}{scale}"


@dataclass(frozen=True)
class Case:
    """A quantizer and a shape that its rank fits."""

    quantizer: AbstractQuantizer
    shape: tuple[int, int]

    def __str__(self) -> str:
        return f"{quantizer_id(self.quantizer)}-{self.shape[0]}x{self.shape[1]}"


CASES = [
    Case(quantizer, shape)
    for quantizer in ALL_QUANTIZERS + OTHER_RATES
    for shape in SHAPES
    if quantizer.format.rank <= min(shape)
]


def normal_weight(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Normal numbers, as the weights of a language model nearly are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def uneven_statistics(shape: tuple[int, int], seed: int = 0) -> LayerStatistics:
    """A Fisher diagonal over four decades: strong rows, strong columns, and noise on top."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows, columns = (
        torch.randn(shape[0], 1, generator=generator),
        torch.randn(1, shape[1], generator=generator),
    )
    noise = torch.randn(shape, generator=generator)
    return LayerStatistics(torch.exp(rows + columns + noise / 2))


def statistics_of(fisher: Tensor) -> LayerStatistics:
    """Statistics with this Fisher diagonal."""
    return LayerStatistics(fisher)
