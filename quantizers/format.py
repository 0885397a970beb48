"""How one matrix is stored: the settings that a reader needs, and the exact tensors that follow from them.

Everything that predicts, writes, reads or audits sizes asks a `StorageFormat`. A kind of quantizer that stores
other tensors brings its own (block_format.py, trellis_format.py); each stores Q by its own tensors, and the
low-rank part, where there is one, as factors.py says.

The levels of a codebook are written once a checkpoint, into its quantization config, so a matrix does not
pay for them.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.factors import FactorFormat

TensorSpecs = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class StorageFormat(ABC):
    """Settings that decide what is stored; final subclasses are frozen dataclasses.

    Attributes:
        kind: the subclass's name in a checkpoint.
        plain_names: of the tensors that store Q.
        rank: of the low-rank part; 0 for none.
        factor_bits: of a number of the low-rank part, see factors.py.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    kind: ClassVar[str]
    plain_names: ClassVar[tuple[str, ...]]
    rank: int = field(default=0, kw_only=True)
    factor_bits: int = field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; it must be at least 0")
        _ = self.factors  # raises where the bits are out of range

    @property
    @abstractmethod
    def plain_label(self) -> str:
        """Short name of what stores Q, e.g. lloyd3-g64-s8."""

    @property
    @abstractmethod
    def codebook_name(self) -> str:
        """Key of the levels in a checkpoint's `codebooks`, e.g. "lloyd3"."""

    @property
    @abstractmethod
    def levels(self) -> Float32[Tensor, " levels"]:
        """The levels that a checkpoint stores under `codebook_name`."""

    @property
    @abstractmethod
    def meaning(self) -> str:
        """What stores Q, in words."""

    @abstractmethod
    def plain_specs(self, shape: tuple[int, int]) -> TensorSpecs:
        """Shape and dtype of every tensor that stores Q, for a matrix of this shape (out, in)."""

    @abstractmethod
    def decode(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " levels"]
    ) -> Float32[Tensor, "out in"]:
        """Q from the tensors of `plain_specs`."""

    def product(
        self,
        x: Float[Tensor, "... n"],
        stored: dict[str, Tensor],
        shape: tuple[int, int],
        levels: Float32[Tensor, " levels"],
        *,
        transposed: bool = False,
    ) -> Float[Tensor, "... m"]:
        """x Q^T, or x Q if `transposed`, in the dtype of `x`; Q lives as long as the product takes."""
        weight = self.decode(stored, shape, levels).to(x.dtype)
        return x @ weight if transposed else x @ weight.T

    @property
    def label(self) -> str:
        """Short name: lloyd3-g64-s4-r8-f6 is 3 bits, blocks (groups) of 64, 4-bit scales, rank 8 in 6 bits."""
        if not self.rank:
            return self.plain_label
        return f"{self.plain_label}-r{self.rank}" + (f"-f{self.factor_bits}" if self.factor_bits != 16 else "")

    @property
    def factors(self) -> FactorFormat:
        """How the low-rank part is stored, where there is one."""
        return FactorFormat(self.factor_bits)

    def tensor_specs(self, shape: tuple[int, int]) -> TensorSpecs:
        """Shape and dtype of every stored tensor of a matrix of this shape (out, in)."""
        specs = self.plain_specs(shape)
        if self.rank:
            specs |= self.factors.tensor_specs(shape, self.rank)
        return specs

    def size_bits(self, shape: tuple[int, int]) -> int:
        """Every bit that a matrix of this shape stores."""
        return sum(8 * dtype.itemsize * math.prod(spec) for spec, dtype in self.tensor_specs(shape).values())

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's configuration, without defaults; `format_from_json` in formats.py undoes it."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        defaults = {each.name: each.default for each in fields(self)}
        return {"kind": self.kind} | {name: value for name, value in told.items() if value != defaults[name]}
