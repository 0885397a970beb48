"""Blocks of a row that share a scale, codes that name levels of the matrix's own.

    <module>.weight_levels   float16 [2**bits]   ascending in [-1, 1]

beside the tensors of abstract_block_format.py; a checkpoint's codebook of this name is empty.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float32
from torch import Tensor

from quantizers.abstract_block_format import CODES_AND_SCALES, AbstractBlockFormat
from quantizers.format import TensorSpecs


@dataclass(frozen=True)
class LearnedFormat(AbstractBlockFormat):
    """See the module.

    Attributes:
        bits, block_size, scale_bits, super_block: see AbstractBlockFormat.
    """

    kind: ClassVar[str] = "learned"
    plain_names: ClassVar[tuple[str, ...]] = (*CODES_AND_SCALES, "weight_levels")

    @property
    def codebook_name(self) -> str:
        """See StorageFormat."""
        return f"kmeans{self.bits}"

    @property
    def levels(self) -> Float32[Tensor, " levels"]:
        """None: every matrix stores its own."""
        return torch.empty(0, dtype=torch.float32, device="cpu")

    @property
    def meaning(self) -> str:
        """See StorageFormat."""
        return f"{self.bits} bits, k-means levels, groups of {self.block_size}, {self.scale_bits}-bit scales"

    def plain_specs(self, shape: tuple[int, int]) -> TensorSpecs:
        """See StorageFormat."""
        return super().plain_specs(shape) | {"weight_levels": ((2**self.bits,), torch.float16)}

    def decode(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " levels"]
    ) -> Float32[Tensor, "out in"]:
        """weight_levels[codes] * scale."""
        return self.scaled_levels(stored, shape, stored["weight_levels"].float())
