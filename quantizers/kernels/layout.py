"""Codes as the kernels read them: one layout for every width, made from the dense packing and turned back into it.

A row is cut into superblocks of 256 columns, 16 fields of 16 lanes (legend: out, super, word, field, lane):

    column = 256 * super + 16 * field + lane

A code is cut into planes of 4, 2 and 1 bits, the low bits first:

    2 bits: 2     3 bits: 2 + 1     4 bits: 4     5 bits: 4 + 1     6 bits: 4 + 2     8 bits: 4 + 4

In a plane of w bits, the 16 fields of a lane fill 16 w bits, field f from bit w f on: two int32 for w = 4, one for
w = 2, one int16 for w = 1. Words of neighbouring lanes are neighbours, so a load of 16 lanes is contiguous, and
one shift by a constant and one mask give the same field of all lanes. Drawn for w = 2, bit 0 on the right:

    word of lane c:   |15 15|14 14|...|2 2|1 1|0 0|        field 2 is column 256 * super + 32 + c

A block of 16, 32, 64 or 128 weights is 1, 2, 4 or 8 fields that follow one another, so all lanes of a field share the
block's scale. Columns after the last are zeros, at most 255 a row, in memory only.
"""

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

LANES = 16
FIELDS = 16
SUPERBLOCK = LANES * FIELDS
PLANE_BITS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
WORDS_AND_DTYPES = {1: (1, torch.int16), 2: (1, torch.int32), 4: (2, torch.int32)}


def num_superblocks(num_columns: int) -> int:
    """Superblocks in one row of `num_columns` columns."""
    return -(-num_columns // SUPERBLOCK)


def to_planes(codes: UInt8[Tensor, "out in"], bits: int) -> tuple[Integer[Tensor, "out super _ lane"], ...]:
    """The planes of codes of `bits` bits, low bits first, each contiguous.

    Args:
        codes: below 2**bits; bits is a key of PLANE_BITS.
    """
    rows, columns = codes.shape
    supers = num_superblocks(columns)
    padded = torch.nn.functional.pad(codes, (0, supers * SUPERBLOCK - columns)).view(rows, supers, FIELDS, LANES)
    planes = []
    shift = 0
    for width in PLANE_BITS[bits]:
        num_words, dtype = WORDS_AND_DTYPES[width]
        words = torch.zeros(rows, supers, num_words, LANES, dtype=torch.int32, device=codes.device)
        for field in range(FIELDS):
            word, first_bit = divmod(width * field, 32)
            part = (padded[:, :, field] >> shift) & (2**width - 1)
            words[:, :, word] |= part.int() << first_bit
        planes.append(words.to(dtype))
        shift += width
    return tuple(planes)


def from_planes(
    planes: tuple[Integer[Tensor, "out super _ lane"], ...], bits: int, num_columns: int
) -> UInt8[Tensor, "out in"]:
    """Undo `to_planes`."""
    rows, supers = planes[0].shape[:2]
    codes = torch.zeros(rows, supers, FIELDS, LANES, dtype=torch.uint8, device=planes[0].device)
    shift = 0
    for width, words in zip(PLANE_BITS[bits], planes, strict=True):
        for field in range(FIELDS):
            word, first_bit = divmod(width * field, 32)
            part = (words[:, :, word].int() >> first_bit) & (2**width - 1)
            codes[:, :, field] |= part.to(torch.uint8) << shift
        shift += width
    return codes.view(rows, supers * SUPERBLOCK)[:, :num_columns].contiguous()
