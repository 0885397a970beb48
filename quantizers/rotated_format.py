"""What formats of a rotated weight have in common: W = R_out W' R_in^T, R the rotations of hadamard.py.

Both rotations follow from `seed` (out) and `seed + 1` (in). Rotated weights look normal and alike everywhere, so one
scale a matrix is enough, and a curvature can be rotated with them.
"""

import math
from abc import abstractmethod

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from quantizers.format import StorageFormat
from quantizers.hadamard import rotate, unrotate


class AbstractRotatedFormat(StorageFormat):
    """See the module; final subclasses are dataclasses with this field among theirs.

    Attributes:
        seed: of the rotations.
    """

    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")

    @abstractmethod
    def decode_rotated(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " levels"]
    ) -> Float32[Tensor, "out in"]:
        """W' from the tensors of `plain_specs`."""

    def decode(
        self, stored: dict[str, Tensor], shape: tuple[int, int], levels: Float32[Tensor, " levels"]
    ) -> Float32[Tensor, "out in"]:
        """See StorageFormat."""
        return self.unrotate(self.decode_rotated(stored, shape, levels))

    def product(
        self,
        x: Float[Tensor, "... n"],
        stored: dict[str, Tensor],
        shape: tuple[int, int],
        levels: Float32[Tensor, " levels"],
        *,
        transposed: bool = False,
    ) -> Float[Tensor, "... m"]:
        """See StorageFormat. Where x has few rows, they and those of the product are rotated, and not the weight."""
        num_rows = math.prod(x.shape[:-1])
        if num_rows * sum(shape) >= math.prod(shape):
            return super().product(x, stored, shape, levels, transposed=transposed)
        before, after = (self.seed, self.seed + 1) if transposed else (self.seed + 1, self.seed)
        turned = rotate(_wide(x), before).to(x.dtype)
        if transposed:
            found = turned @ self.decode_rotated(stored, shape, levels).to(x.dtype)
        else:
            found = self.rotated_product(turned, stored, shape, levels)
        return unrotate(_wide(found), after).to(x.dtype)

    def rotated_product(
        self,
        x: Float[Tensor, "... in"],
        stored: dict[str, Tensor],
        shape: tuple[int, int],
        levels: Float32[Tensor, " levels"],
    ) -> Float[Tensor, "... out"]:
        """x W'^T for few rows, in the dtype of `x`."""
        return x @ self.decode_rotated(stored, shape, levels).to(x.dtype).T

    def rotate(self, weight: Float32[Tensor, "out in"]) -> Float32[Tensor, "out in"]:
        """R_out^T W R_in"""
        return rotate(rotate(weight, self.seed + 1), self.seed, dim=0)

    def unrotate(self, rotated: Float32[Tensor, "out in"]) -> Float32[Tensor, "out in"]:
        """R_out W' R_in^T"""
        return unrotate(unrotate(rotated, self.seed + 1), self.seed, dim=0)

    @staticmethod
    def rotate_curvature(curvature: Float32[Tensor, "n n"], seed: int) -> Float32[Tensor, "n n"]:
        """The same quadratic form in the rotated basis."""
        return rotate(rotate(curvature, seed), seed, dim=0)


def _wide(x: Tensor) -> Tensor:
    """In a dtype that can be rotated."""
    return x if x.dtype == torch.float64 else x.float()
