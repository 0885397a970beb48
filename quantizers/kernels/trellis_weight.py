"""A matrix of a trellis as the kernel reads it: the symbols of each tile of 256 weights backwards.

A state is a window over the latest symbols, the latest lowest. Stored, symbols follow one another from the low bits
up, so a window lies there back to front. Backwards, weight t's symbol is at bit (255 - t) * bits of its tile, those
before it are above it, and its state is the `state_bits` bits from there on, around the end to bit 0:

    |  symbol 0  |  symbol 1  | ... | symbol t - 1 |  symbol t  | ... |  symbol 255  |     bit 0 on the right
                                |<------ state of t ----------->|

It takes the same memory as the dense packing.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from quantizers.hadamard import rotate, unrotate
from quantizers.kernels.abstract_weight import MOST_FUSED_ROWS, AbstractKernelWeight, KernelFactors
from quantizers.packing import pack, unpack
from quantizers.trellis_format import TILE, TrellisFormat

TILE_WEIGHTS = TILE * TILE


@dataclass(frozen=True)
class TrellisWeight(AbstractKernelWeight):
    """See the module.

    Attributes:
        words: 8 * bits of each tile.
        scale: of the levels.
        levels: of the states.
    """

    replaces: ClassVar[tuple[str, ...]] = ("weight_packed",)
    form: TrellisFormat
    shape: tuple[int, int]
    words: Int32[Tensor, "tiles words"]
    scale: Float32[Tensor, " 1"]
    levels: Float32[Tensor, " states"]

    @staticmethod
    def from_stored(
        form: TrellisFormat, shape: tuple[int, int], stored: dict[str, Tensor], levels: Tensor
    ) -> "TrellisWeight":
        """See AbstractKernelWeight."""
        words = _backwards(stored["weight_packed"], form.bits).view(-1, 8 * form.bits)
        return TrellisWeight(form, shape, words, stored["weight_scale"], levels)

    def stored(self) -> dict[str, Tensor]:
        """See AbstractKernelWeight."""
        return {"weight_packed": _backwards(self.words.view(-1), self.form.bits)}

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """See AbstractKernelWeight."""
        return self.form.unrotate(self.rotated(torch.float32)).to(dtype)

    def rotated(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """W' = R_out^T W R_in, see rotated_format.py."""
        from quantizers.kernels.trellis import dequantize_trellis

        return dequantize_trellis(self, dtype)

    def product(self, x: Float[Tensor, "rows in"], factors: KernelFactors | None = None) -> Float[Tensor, "rows out"]:
        """See AbstractKernelWeight. The rows of x and y are rotated, in float32, and not the weight."""
        from quantizers.kernels.trellis import trellis_product

        if x.shape[0] == 0:
            return x.new_empty(0, self.shape[0])
        turned = rotate(x.float(), self.form.seed + 1).to(x.dtype)
        if x.shape[0] > MOST_FUSED_ROWS or x.dtype == torch.float32:
            y = torch.nn.functional.linear(turned, self.rotated(x.dtype))
        else:
            y = trellis_product(turned, self)
        y = unrotate(y.float(), self.form.seed).to(x.dtype)
        return y if factors is None else y + factors.product(x)

    def back(self, gradient: Float[Tensor, "rows out"]) -> Float[Tensor, "rows in"]:
        """See AbstractKernelWeight; as in `product`, rows are rotated."""
        turned = rotate(gradient.float(), self.form.seed).to(gradient.dtype)
        return unrotate((turned @ self.rotated(gradient.dtype)).float(), self.form.seed + 1).to(gradient.dtype)


def _backwards(words: Int32[Tensor, " words"], bits: int) -> Int32[Tensor, " words"]:
    """Every tile's symbols in the opposite order; its own inverse."""
    symbols = unpack(words, bits, words.numel() * 32 // bits).view(-1, TILE_WEIGHTS)
    return pack(symbols.flip(1).reshape(-1), bits)
