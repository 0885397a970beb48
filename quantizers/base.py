"""The contract of a quantizer.

A quantizer is a frozen dataclass: its fields are its settings, checked once at construction. It turns a
weight into a `QuantizedTensor` and says beforehand exactly how many bits will be stored. Law, tested for
every one of them: `q.size_bits(w.shape) == q.quantize(w).size_bits ==` bytes on disk x 8.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.format import StorageFormat
from quantizers.quantized import QuantizedTensor
from quantizers.statistics import LayerStatistics


class AbstractQuantizer(ABC):
    """Tensors in, tensors out; final subclasses are frozen dataclasses."""

    @property
    @abstractmethod
    def format(self) -> StorageFormat:
        """How the result is stored."""

    @abstractmethod
    def quantize(self, weight: Float[Tensor, "out in"], statistics: LayerStatistics | None = None) -> QuantizedTensor:
        """Quantize `weight`, on its device, leaving it as it is.

        Args:
            weight: finite, any float dtype.
            statistics: the error is weighted with its Fisher diagonal, or with its curvature, and then fed back to what
                is rounded later; unweighted if None.
        Raises:
            ValueError: `weight` has a NaN or an infinity.
        """

    @abstractmethod
    def seconds_per_million(self, curved_sides: int) -> float:
        """About how long a million weights take on one thread of a CPU.

        Args:
            curved_sides: 2 where both factors of the curvature are known, along which errors are fed back; 1 where the
                inputs' alone is, or 0.
        """

    def size_bits(self, shape: tuple[int, int]) -> int:
        """Every bit that a quantized weight of this shape stores."""
        return self.format.size_bits(shape)


def finite_float32(weight: Float[Tensor, "out in"]) -> Float32[Tensor, "out in"]:
    """`weight` without its history, contiguous.

    Raises:
        ValueError: it has a NaN or an infinity.
    """
    weight = weight.detach().float().contiguous()
    if not torch.isfinite(weight).all():
        raise ValueError("the weight has a NaN or an infinity; a quantizer needs finite numbers")
    return weight
