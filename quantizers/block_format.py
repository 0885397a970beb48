"""Blocks of a row that share a scale, codes that name levels of a codebook that all matrices share.

Stored as abstract_block_format.py says, and nothing else.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.abstract_block_format import CODES_AND_SCALES, AbstractBlockFormat
from quantizers.codebooks import lloyd_max, normal_float
from quantizers.compiled import block_product

CODEBOOKS = {"nf": normal_float, "lloyd": lloyd_max}
CODEBOOK_NAMES = {"nf": "NormalFloat", "lloyd": "Lloyd-Max"}


@dataclass(frozen=True)
class BlockFormat(AbstractBlockFormat):
    """See the module.

    Attributes:
        codebook: key of CODEBOOKS.
        bits, block_size, scale_bits, super_block: see AbstractBlockFormat.
    """

    kind: ClassVar[str] = "block"
    plain_names: ClassVar[tuple[str, ...]] = CODES_AND_SCALES
    codebook: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook is {self.codebook!r}; it must be one of {', '.join(sorted(CODEBOOKS))}")

    @property
    def codebook_name(self) -> str:
        """See StorageFormat."""
        return f"{self.codebook}{self.bits}"

    @property
    def levels(self) -> Float32[Tensor, " levels"]:
        """The 2**bits levels, ascending in [-1, 1]."""
        return CODEBOOKS[self.codebook](self.bits)

    @property
    def meaning(self) -> str:
        """See StorageFormat."""
        name = CODEBOOK_NAMES[self.codebook]
        return f"{self.bits} bits, {name} levels, groups of {self.block_size}, {self.scale_bits}-bit scales"

    def product(
        self,
        x: Float[Tensor, "... n"],
        stored: dict[str, Tensor],
        shape: tuple[int, int],
        levels: Float32[Tensor, " levels"],
        *,
        transposed: bool = False,
    ) -> Float[Tensor, "... m"]:
        """See StorageFormat."""
        found = None if transposed else self.compiled_product(x, stored, shape, levels)
        if found is not None:
            return found
        return super().product(x, stored, shape, levels, transposed=transposed)

    def compiled_product(
        self,
        x: Float[Tensor, "... n"],
        stored: dict[str, Tensor],
        shape: tuple[int, int],
        levels: Float32[Tensor, " levels"],
    ) -> Float[Tensor, "... m"] | None:
        """x Q^T with nothing dense; None where no compiled loop serves, see compiled.py."""
        sizes = {"block_size": self.block_size, "scale_bits": self.scale_bits, "super_block": self.super_block}
        return block_product(x, stored, shape, levels, bits=self.bits, **sizes)

    def decode(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " levels"]
    ) -> Float32[Tensor, "out in"]:
        """levels[codes] * scale."""
        return self.scaled_levels(stored, shape, levels)
