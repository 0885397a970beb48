"""A rotated weight, each 8 weights of a row coded by a point of the E8 lattice, or by the sum of two.

    <module>.weight_packed    int32 [words]    `bits` bytes for 8 weights, row by row
    <module>.weight_scale     float32 [1]      what the points are multiplied by

    Q = R_out (scale * (first + step * second)) R_in^T,   R as in rotated_format.py

The first point (bytes 0 and 1) is lattice.py's. The second is there for 3 bits (byte 2: a fine point) and for 4
(bytes 2 and 3: again lattice.py's), with the steps below: residual vector quantization, as in QuIP#
(arXiv:2402.04396). Where the rows' length is no multiple of 8, the last 8 are padded, and the padding is stored.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from quantizers.format import TensorSpecs
from quantizers.lattice import DIMENSION, fine_points, lattice_decode, lattice_patterns
from quantizers.packing import num_words, unpack
from quantizers.rotated_format import AbstractRotatedFormat

STEPS = {2: 0.0, 3: 0.47, 4: 0.26}  # of the second point; found beside NORMAL_SCALES in lattice_coded.py
NUM_PATTERNS = 256


@dataclass(frozen=True)
class LatticeFormat(AbstractRotatedFormat):
    """See the module.

    Attributes:
        bits: bits a weight, 2 to 4.
        seed: of the rotations.
    """

    kind: ClassVar[str] = "lattice"
    plain_names: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    bits: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in STEPS:
            raise ValueError(f"bits is {self.bits}; it must be one of {tuple(STEPS)}")

    @property
    def plain_label(self) -> str:
        """See StorageFormat."""
        return self.codebook_name

    @property
    def codebook_name(self) -> str:
        """See StorageFormat."""
        return f"e8p{self.bits}"

    @property
    def levels(self) -> Float32[Tensor, " levels"]:
        """The 256 x 8 patterns one after another, and after them, for 3 bits, the 256 x 8 fine points."""
        tables = [lattice_patterns(), fine_points()] if self.bits == 3 else [lattice_patterns()]
        return torch.cat(tables).flatten()

    @property
    def meaning(self) -> str:
        """See StorageFormat."""
        return f"{self.bits} bits, rotated and coded 8 at once by {'a point' if self.bits == 2 else 'two points'} of E8"

    def plain_specs(self, shape: tuple[int, int]) -> TensorSpecs:
        """See StorageFormat."""
        vectors = shape[0] * num_vectors(shape[1])
        return {
            "weight_packed": ((num_words(vectors * self.bits, 8),), torch.int32),
            "weight_scale": ((1,), torch.float32),
        }

    def decode_rotated(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " levels"]
    ) -> Float32[Tensor, "out in"]:
        """See AbstractRotatedFormat."""
        vectors = shape[0] * num_vectors(shape[1])
        codes = unpack(stored["weight_packed"], 8, vectors * self.bits).view(vectors, self.bits)
        values = self.points(codes, levels) * stored["weight_scale"]
        return values.view(shape[0], -1)[:, : shape[1]]

    def points(self, codes: UInt8[Tensor, "n bytes"], levels: Float32[Tensor, " levels"]) -> Float32[Tensor, "n 8"]:
        """first + step * second."""
        tables = levels.view(-1, NUM_PATTERNS, DIMENSION)
        first = lattice_decode(codes[:, :2], tables[0])
        if self.bits == 2:
            return first
        second = tables[1][codes[:, 2].int()] if self.bits == 3 else lattice_decode(codes[:, 2:], tables[0])
        return first + STEPS[self.bits] * second


def num_vectors(num_columns: int) -> int:
    """Points for a row of `num_columns` weights."""
    return -(-num_columns // DIMENSION)
