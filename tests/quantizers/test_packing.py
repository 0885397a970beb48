"""Codes come back from their bit stream, and the stream is the one that the docstring draws."""

import pytest
import torch
from torch import Tensor

from quantizers.packing import look_up, num_words, pack, unpack

WIDTHS = range(1, 9)
LENGTHS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 1001]


def random_codes(bits: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits * 10_000 + length)
    codes = torch.randint(0, 2**bits, (length,), generator=generator).to(torch.uint8)
    codes[-1:] = 2**bits - 1  # the last bit in use is set
    return codes


def words_of(codes: Tensor, bits: int) -> list[int]:
    """The bit stream as one big integer, cut into unsigned 32-bit words."""
    stream = sum(code << (k * bits) for k, code in enumerate(codes.tolist()))
    length = -(-len(codes) * bits // 32)
    data = stream.to_bytes(4 * length, "little")
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_undoes_pack(bits: int) -> None:
    for length in LENGTHS:
        codes = random_codes(bits, length)
        assert torch.equal(unpack(pack(codes, bits), bits, length), codes), length


@pytest.mark.parametrize("bits", WIDTHS)
def test_words_are_the_little_endian_stream(bits: int) -> None:
    for length in LENGTHS:
        codes = random_codes(bits, length)
        words = pack(codes, bits)
        assert words.dtype == torch.int32
        assert [word % 2**32 for word in words.tolist()] == words_of(codes, bits), length
        assert words.numel() == num_words(length, bits)


def test_the_drawn_picture() -> None:
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 0b101, 0b110, 0b011], dtype=torch.uint8)
    first, second = (f"{word % 2**32:032b}" for word in pack(codes, 3).tolist())
    assert first == "01" + "010" + "001" + "000" + "111" + "110" + "101" + "100" + "011" + "010" + "001"
    assert second == "0" * 25 + "011" + "110" + "1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("bits", WIDTHS)
def test_look_up_gives_the_levels_of_the_codes(bits: int, dtype: torch.dtype) -> None:
    codes = random_codes(bits, 101)
    levels = (torch.randperm(2**bits, generator=torch.Generator().manual_seed(bits)) % 256).to(dtype)
    found = look_up(pack(codes, bits), bits, 101, levels)
    assert found.dtype == dtype
    assert torch.equal(found, levels[codes.long()])


@pytest.mark.parametrize("surplus", [-1, 1])
@pytest.mark.parametrize("bits", WIDTHS)
def test_another_number_of_words_is_refused(bits: int, surplus: int) -> None:
    words = pack(random_codes(bits, 100), bits)
    wrong = words[:-1] if surplus < 0 else torch.nn.functional.pad(words, (0, 1))
    with pytest.raises(ValueError, match=f"100 codes of {bits} bits take {len(words)} words, but {len(wrong)}"):
        unpack(wrong, bits, 100)
    with pytest.raises(ValueError, match="words"):
        look_up(wrong, bits, 100, torch.zeros(2**bits))


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"does not fit in {bits} bits"):
        pack(torch.tensor([0, 2**bits], dtype=torch.uint8), bits)


def test_packing_a_view_reads_the_view() -> None:
    codes = random_codes(5, 200)
    assert torch.equal(unpack(pack(codes[::2], 5), 5, 100), codes[::2])
