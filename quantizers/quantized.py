"""A quantized weight: W ~ Q + L1 L2, as it is stored."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import BFloat16, Float, Float32
from torch import Tensor

from quantizers.format import StorageFormat


@dataclass(frozen=True)
class LowRank:
    """L1 [out, rank] and L2 [rank, in], as they are stored."""

    out: BFloat16[Tensor, "out rank"]
    into: BFloat16[Tensor, "rank in"]

    def product(self) -> Float32[Tensor, "out in"]:
        """L1 L2 in float32."""
        return self.out.float() @ self.into.float()


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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Q + L1 L2, computed in float32."""
        weight = self.quantized_part()
        if self.low_rank is not None:
            weight = weight + self.low_rank.product()
        return weight.to(dtype)

    def with_low_rank(self, low_rank: LowRank) -> "QuantizedTensor":
        """The same codes with other factors."""
        return replace(self, format=replace(self.format, rank=low_rank.out.shape[1]), low_rank=low_rank)

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, named as in `StorageFormat.tensor_specs`."""
        if self.low_rank is None:
            return dict(self.plain)
        return self.plain | {"low_rank_out": self.low_rank.out, "low_rank_in": self.low_rank.into}

    @staticmethod
    def from_tensors(
        form: StorageFormat,
        shape: tuple[int, int],
        levels: Float32[Tensor, " levels"],
        stored: dict[str, Tensor],
    ) -> "QuantizedTensor":
        """Undo `tensors`."""
        plain = {name: stored[name] for name in form.plain_names}
        low_rank = LowRank(stored["low_rank_out"], stored["low_rank_in"]) if form.rank else None
        return QuantizedTensor(form, shape, plain, levels, low_rank)

    @property
    def size_bits(self) -> int:
        """Bits of all stored tensors."""
        return sum(8 * tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
