"""How one matrix is stored: the settings that a reader needs, and the exact tensors that follow from them.

    <module>.weight_packed         int32 [words]          codes, see packing.py
    <module>.weight_scale_packed   int32 [words]          scale codes, see double_quant.py
    <module>.weight_scale_step     float32 [super-blocks]
    <module>.weight_scale_offset   float32 [1]
    <module>.low_rank_out          bfloat16 [out, rank]   L1, only where rank > 0
    <module>.low_rank_in           bfloat16 [rank, in]    L2, only where rank > 0

The levels of a codebook are written once a checkpoint, into its quantization config, so a matrix does not
pay for them. Everything that predicts, writes, reads or audits sizes asks this file.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from quantizers.blocks import num_blocks
from quantizers.codebooks import lloyd_max, normal_float
from quantizers.packing import num_words

CODEBOOKS = {"nf": normal_float, "lloyd": lloyd_max}
BITS = (2, 3, 4, 5, 6, 8)
BLOCK_SIZES = (16, 32, 64, 128)
LOW_RANK_DTYPE = torch.bfloat16
PACKED_NAMES = (
    *("weight_packed", "weight_scale_packed", "weight_scale_step", "weight_scale_offset"),
    *("low_rank_out", "low_rank_in"),
)


@dataclass(frozen=True)
class StorageFormat:
    """Settings that decide what is stored.

    Attributes:
        codebook: key of CODEBOOKS.
        bits: width of a code.
        block_size: weights of a row that share a scale.
        scale_bits: width of a stored scale.
        super_block: scales that share a second-level step.
        rank: of the low-rank part; 0 for none.

    Raises:
        ValueError: naming the setting that is out of range.
    """

    codebook: str
    bits: int
    block_size: int
    scale_bits: int
    super_block: int
    rank: int = 0

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook is {self.codebook!r}; it must be one of {', '.join(sorted(CODEBOOKS))}")
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; it must be one of {BITS}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size is {self.block_size}; it must be one of {BLOCK_SIZES}")
        if not 2 <= self.scale_bits <= 8:
            raise ValueError(f"scale_bits is {self.scale_bits}; it must be 2 to 8")
        if self.super_block < 1:
            raise ValueError(f"super_block is {self.super_block}; it must be at least 1")
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}; it must be at least 0")

    @property
    def label(self) -> str:
        """Short name: lloyd3-g64-s8-r8 is 3 bits, blocks (groups) of 64, 8-bit scales, rank 8."""
        rank = f"-r{self.rank}" if self.rank else ""
        return f"{self.codebook}{self.bits}-g{self.block_size}-s{self.scale_bits}{rank}"

    @property
    def codebook_name(self) -> str:
        """Key of the levels in a checkpoint's `codebooks`, e.g. "lloyd3"."""
        return f"{self.codebook}{self.bits}"

    @property
    def levels(self) -> Float32[Tensor, " levels"]:
        """The 2**bits levels, ascending in [-1, 1]."""
        return CODEBOOKS[self.codebook](self.bits)

    def num_scales(self, shape: tuple[int, int]) -> int:
        """Blocks of a matrix of this shape (out, in)."""
        return shape[0] * num_blocks(shape[1], self.block_size)

    def tensor_specs(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor of a matrix of this shape (out, in)."""
        rows, columns = shape
        scales = self.num_scales(shape)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_packed": ((num_words(rows * columns, self.bits),), torch.int32),
            "weight_scale_packed": ((num_words(scales, self.scale_bits),), torch.int32),
            "weight_scale_step": ((-(-scales // self.super_block),), torch.float32),
            "weight_scale_offset": ((1,), torch.float32),
        }
        if self.rank:
            specs["low_rank_out"] = ((rows, self.rank), LOW_RANK_DTYPE)
            specs["low_rank_in"] = ((self.rank, columns), LOW_RANK_DTYPE)
        return specs

    def size_bits(self, shape: tuple[int, int]) -> int:
        """Every bit that a matrix of this shape stores."""
        return sum(8 * dtype.itemsize * math.prod(spec) for spec, dtype in self.tensor_specs(shape).values())
