"""A quantized weight: W ~ Q + L1 L2, as it is stored."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.factors import FactorFormat, dequantize_factors
from quantizers.format import StorageFormat
from solvers.low_rank import Factors


@dataclass(frozen=True)
class LowRank:
    """L1 [out, rank] and L2 [rank, in], as they are stored.

    Attributes:
        tensors: of `FactorFormat.tensor_specs`.
        bits: of a number, see factors.py.
    """

    tensors: dict[str, Tensor]
    bits: int
    rank: int
    shape: tuple[int, int]

    def factors(self) -> Factors:
        """L1 and L2 in float32."""
        return dequantize_factors(self.tensors, FactorFormat(self.bits), self.shape, self.rank)

    def product(self) -> Float32[Tensor, "out in"]:
        """L1 L2 in float32."""
        return self.factors().product()


@dataclass(frozen=True)
class QuantizedTensor:
    """One quantized weight of shape (out, in).

    Attributes:
        format: how it is stored.
        shape: (out, in).
        plain: the tensors of `format.plain_specs`, which store Q.
        levels: of the format's codebook.
        low_rank: there if `format.rank` is above 0.
    """

    format: StorageFormat
    shape: tuple[int, int]
    plain: dict[str, Tensor]
    levels: Float32[Tensor, " levels"]
    low_rank: LowRank | None = None

    def quantized_part(self) -> Float32[Tensor, "out in"]:
        """Q in float32."""
        return self.format.decode(self.plain, self.shape, self.levels)

    def product(self, x: Float[Tensor, "... n"], *, transposed: bool = False) -> Float[Tensor, "... m"]:
        """x Q^T, or x Q if `transposed`, in the dtype of `x`: no low-rank part."""
        return self.format.product(x, self.plain, self.shape, self.levels, transposed=transposed)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Q + L1 L2, computed in float32."""
        weight = self.quantized_part()
        if self.low_rank is not None:
            weight = weight + self.low_rank.product()
        return weight.to(dtype)

    def with_low_rank(self, low_rank: LowRank) -> "QuantizedTensor":
        """The same codes with other factors."""
        form = replace(self.format, rank=low_rank.rank, factor_bits=low_rank.bits)
        return replace(self, format=form, low_rank=low_rank)

    def without_low_rank(self) -> "QuantizedTensor":
        """Q alone."""
        return replace(self, format=replace(self.format, rank=0, factor_bits=16), low_rank=None)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, named as in `StorageFormat.tensor_specs`."""
        if self.low_rank is None:
            return dict(self.plain)
        return self.plain | self.low_rank.tensors

    @staticmethod
    def from_tensors(
        form: StorageFormat,
        shape: tuple[int, int],
        levels: Float32[Tensor, " levels"],
        stored: dict[str, Tensor],
    ) -> "QuantizedTensor":
        """Undo `tensors`."""
        plain = {name: stored[name] for name in form.plain_names}
        if not form.rank:
            return QuantizedTensor(form, shape, plain, levels)
        tensors = {name: stored[name] for name in form.factors.tensor_specs(shape, form.rank)}
        low_rank = LowRank(tensors, form.factor_bits, form.rank, shape)
        return QuantizedTensor(form, shape, plain, levels, low_rank)

    @property
    def size_bits(self) -> int:
        """Bits of all stored tensors."""
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
