"""b-bit codes <-> 32-bit words, dense: n codes take ceil(n*b/32) words, whatever n and b.

Code k occupies bits k*b ... (k+1)*b - 1 of one little-endian bit stream; a code may straddle two words.
Drawn for b = 3 (code numbers above the bits they occupy, bit 0 on the right):

    word 0:  |10 10|9 9 9|8 8 8|7 7 7|...|1 1 1|0 0 0|
    word 1:  ...           |12 12 12|11 11 11|10|

The unused high bits of the last word are zero.

Reading goes by fields of a few whole codes: bytes for 1, 2, 4 and 8 bits, 12 bits for 3 and 6, 10 bits for
5, 7 bits for 7; a table of all values of a field turns reading and looking up the levels into one gather.
"""

import math

import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor

WORD_BITS = 32
CODES_AT_ONCE = 2**19  # a multiple of 32
FIELD_BITS = {1: 8, 2: 8, 3: 12, 4: 8, 5: 10, 6: 12, 7: 7, 8: 8}


def num_words(num_codes: int, bits: int) -> int:
    """Words that `num_codes` codes of `bits` bits take."""
    return -(-num_codes * bits // WORD_BITS)


def pack(codes: UInt8[Tensor, " codes"], bits: int) -> Int32[Tensor, " words"]:
    """Pack `codes` (each < 2**bits, bits 1 to 8) into `num_words(len(codes), bits)` words.

    Raises:
        ValueError: a code does not fit in `bits`.
    """
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit in {bits} bits; codes must be below {2**bits}")
    first_bit = torch.arange(WORD_BITS, device=codes.device) * bits  # 32 codes fill exactly `bits` words
    word, shift = first_bit // WORD_BITS, (first_bit % WORD_BITS)[:, None]
    packed = []
    for some in codes.split(CODES_AT_ONCE):
        groups = -(-some.numel() // WORD_BITS)
        padded = torch.nn.functional.pad(some, (0, groups * WORD_BITS - some.numel())).view(groups, WORD_BITS)
        shifted = padded.T.to(torch.int64) << shift
        words = torch.zeros(bits + 1, groups, dtype=torch.int64, device=codes.device)
        words.index_add_(0, word, shifted & 0xFFFFFFFF)  # no two codes share a bit
        words.index_add_(0, word + 1, shifted >> WORD_BITS)
        packed.append(words[:bits].T.reshape(-1).to(torch.int32))
    return torch.cat(packed)[: num_words(codes.numel(), bits)].clone()


def unpack(words: Int32[Tensor, " words"], bits: int, num_codes: int) -> UInt8[Tensor, " codes"]:
    """The first `num_codes` codes of a bit stream made by `pack`.

    Raises:
        ValueError: the number of words is not the one that `num_codes` codes take.
    """
    return look_up(words, bits, num_codes, torch.arange(2**bits, dtype=torch.uint8, device=words.device))


def look_up(words: Int32[Tensor, " words"], bits: int, num_codes: int, levels: Tensor) -> Tensor:
    """`levels[codes]` for the first `num_codes` codes of a bit stream made by `pack`.

    Args:
        levels: [2**bits], any dtype.
    Returns:
        [num_codes] of the dtype of `levels`.
    Raises:
        ValueError: the number of words is not the one that `num_codes` codes take.
    """
    expected = num_words(num_codes, bits)
    if words.numel() != expected:
        raise ValueError(f"{num_codes} codes of {bits} bits take {expected} words, but {words.numel()} are there")
    field_bits = FIELD_BITS[bits]
    shifts = torch.arange(0, field_bits, bits, device=words.device)
    codes = (torch.arange(2**field_bits, device=words.device)[:, None] >> shifts) & (2**bits - 1)
    table = levels[codes]  # [values of a field, codes of a field]
    return table.index_select(0, _fields(words, field_bits)).view(-1)[:num_codes]


def gather(words: Int32[Tensor, " words"], bits: int, positions: Int64[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    """The codes at some positions of a bit stream made by `pack`; the rest of it is not read."""
    word, shift = positions * bits // WORD_BITS, positions * bits % WORD_BITS
    low, high = (words[each].long() & 0xFFFFFFFF for each in (word, (word + 1).clamp_max(words.numel() - 1)))
    return (((high << WORD_BITS | low) >> shift) & (2**bits - 1)).to(torch.uint8)


def _fields(words: Int32[Tensor, " words"], field_bits: int) -> Int32[Tensor, " fields"]:
    """The bit stream cut into fields of `field_bits` bits, zeros after its end."""
    if field_bits == 8:
        return words.view(torch.uint8).int()
    bytes_per_group = math.lcm(field_bits, 8) // 8
    stream = words.view(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % bytes_per_group)).view(-1, bytes_per_group).int()
    fields_per_group = bytes_per_group * 8 // field_bits
    fields = torch.empty(stream.shape[0], fields_per_group, dtype=torch.int32, device=words.device)
    for k in range(fields_per_group):
        byte, shift = divmod(k * field_bits, 8)
        value = stream[:, byte] >> shift
        for extra in range(1, -(-(shift + field_bits) // 8)):
            value = value | (stream[:, byte + extra] << (8 * extra - shift))
        fields[:, k] = value & (2**field_bits - 1)
    return fields.view(-1)
