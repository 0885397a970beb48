"""What a layer asks of a matrix in a kernel's layout, and the low-rank part that kernels add."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from quantizers.factors import OUT, FactorFormat, dequantize_into
from quantizers.quantized import LowRank

FUSED_FACTOR_BITS = (16, 8)
MOST_FUSED_ROWS = 16  # above this many rows the weight is dequantized once, and torch multiplies


@dataclass(frozen=True)
class KernelFactors:
    """A low-rank part of 16 or 8 bits: L2 goes through torch, L1 is read by the kernels as it is stored."""

    low_rank: LowRank

    @staticmethod
    def fits(low_rank: LowRank | None) -> bool:
        """Can kernels add it (or is there none)?"""
        return low_rank is None or low_rank.bits in FUSED_FACTOR_BITS

    def inner(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows rank"]:
        """x L2^T."""
        low_rank = self.low_rank
        into = dequantize_into(low_rank.tensors, FactorFormat(low_rank.bits), low_rank.shape, low_rank.rank)
        return torch.nn.functional.linear(x, into.to(x.dtype))

    def product(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        """(x L2^T) L1^T, in torch."""
        return torch.nn.functional.linear(self.inner(x), self.low_rank.factors().out.to(x.dtype))

    def pointers(self) -> tuple[Tensor, Tensor]:
        """L1 and its scales, see `load_factor` in decode.py; shared with what is stored. 16 bits have no scales."""
        tensors = self.low_rank.tensors
        if self.low_rank.bits == 16:
            out = tensors[OUT].view(torch.int16)
            return out, out
        return tensors[f"{OUT}_packed"].view(torch.uint8), tensors[f"{OUT}_scale"].view(torch.int16)


class AbstractKernelWeight(ABC):
    """A matrix Q as kernels read it; final subclasses are frozen dataclasses of tensors.

    Attributes:
        replaces: the stored tensors that `stored` gives again, so that nobody needs to keep them.
    """

    replaces: ClassVar[tuple[str, ...]]

    @staticmethod
    @abstractmethod
    def from_stored(
        form: Any, shape: tuple[int, int], stored: dict[str, Tensor], levels: Tensor
    ) -> "AbstractKernelWeight":
        """From the tensors of `form.plain_specs`, on their device."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """Those of `replaces` that the format has, bit for bit, made anew: a pass over all codes."""

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Q, computed in float32."""

    @abstractmethod
    def product(self, x: Float[Tensor, "rows in"], factors: KernelFactors | None = None) -> Float[Tensor, "rows out"]:
        """x Q^T + (x L2^T) L1^T in the dtype of `x`: float32, float16 or bfloat16."""

    def back(self, gradient: Float[Tensor, "rows out"]) -> Float[Tensor, "rows in"]:
        """The gradient of the input of x Q^T: `gradient` Q, in its dtype; Q is there for as long as it takes."""
        return gradient @ self.dense(gradient.dtype)
