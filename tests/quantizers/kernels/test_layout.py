"""Codes in planes: where each bit stands, and back again."""

import pytest
import torch
from torch import Tensor

from quantizers.kernels.layout import PLANE_BITS, from_planes, num_superblocks, to_planes


def random_codes(rows: int, columns: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", PLANE_BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 255), (2, 256), (4, 257), (2, 1000), (0, 5)], ids=str)
def test_planes_give_the_codes_back(bits: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    planes = to_planes(codes, bits)
    assert torch.equal(from_planes(planes, bits, shape[1]), codes)
    assert all(plane.is_contiguous() for plane in planes)
    stored_bits = sum(8 * plane.numel() * plane.element_size() for plane in planes)
    assert stored_bits == shape[0] * num_superblocks(shape[1]) * 256 * bits


@pytest.mark.parametrize("bits", PLANE_BITS)
def test_every_bit_stands_where_the_picture_says(bits: int) -> None:
    codes = random_codes(2, 512, bits)
    planes = to_planes(codes, bits)
    for column in [0, 1, 15, 16, 37, 130, 255, 256, 300, 511]:
        sup, field, lane = column // 256, column // 16 % 16, column % 16
        code, shift = 0, 0
        for width, plane in zip(PLANE_BITS[bits], planes, strict=True):
            word = int(plane[1, sup, width * field // 32, lane])
            code |= ((word >> (width * field % 32)) % 2**width) << shift
            shift += width
        assert code == int(codes[1, column])


def test_the_picture_of_two_bits() -> None:
    """Field 2 of lane 5 is column 37, bits 4 and 5 of its word."""
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 37] = 3
    (plane,) = to_planes(codes, 2)
    assert plane.nonzero().tolist() == [[0, 0, 0, 5]]
    assert int(plane[0, 0, 0, 5]) == 0b110000
