"""Low-rank factors in few bits: L1 [out, rank] and L2 [rank, in] as they are stored.

    16 bits      low_rank_out          bfloat16 [out, rank]
                 low_rank_in           bfloat16 [rank, in]
    8, 6, 4, 3   low_rank_out_packed   int32 [words]          codes + q of L1^T [rank, out], row-major, see packing.py
                 low_rank_out_scale    bfloat16 [rank, blocks]
                 low_rank_in_packed    int32 [words]          codes + q of L2 [rank, in]
                 low_rank_in_scale     bfloat16 [rank, blocks]

A scale serves `BLOCK_SIZE` numbers of one rank-one component (a column of L1, a row of L2), so the split of a
component's size between both factors does not matter. Codes: see symmetric_uniform.py.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import BFloat16, Float, Float32, Int32
from torch import Tensor

from quantizers.blocks import num_blocks, spread, to_blocks
from quantizers.packing import look_up, num_words, pack
from quantizers.symmetric_uniform import largest_code, quantize_uniform
from solvers.low_rank import Factors

FACTOR_BITS = (16, 8, 6, 4, 3)
BLOCK_SIZE = 128  # 0.125 bits a number. One scale a component loses 2 to 5% of the gain at 4 bits, 64 wins 1% back
OUT, INTO = "low_rank_out", "low_rank_in"
FACTOR_NAMES = tuple(f"{name}{part}" for name in (OUT, INTO) for part in ("", "_packed", "_scale"))


@dataclass(frozen=True)
class FactorFormat:
    """How both factors are stored.

    Attributes:
        bits: of a number of L1 or L2, scales apart; one of FACTOR_BITS, 16 is bfloat16.

    Raises:
        ValueError: `bits` is another number.
    """

    bits: int = 16

    def __post_init__(self) -> None:
        if self.bits not in FACTOR_BITS:
            raise ValueError(f"bits of a factor is {self.bits}; it must be one of {FACTOR_BITS}")

    def tensor_specs(self, shape: tuple[int, int], rank: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor of the factors of a matrix of this shape (out, in)."""
        rows, columns = shape
        if self.bits == 16:
            return {OUT: ((rows, rank), torch.bfloat16), INTO: ((rank, columns), torch.bfloat16)}
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, length in ((OUT, rows), (INTO, columns)):
            specs[f"{name}_packed"] = ((num_words(rank * length, self.bits),), torch.int32)
            specs[f"{name}_scale"] = ((rank, num_blocks(length, BLOCK_SIZE)), torch.bfloat16)
        return specs

    def size_bits(self, shape: tuple[int, int], rank: int) -> int:
        """Every bit that factors of this rank store."""
        return sum(8 * dtype.itemsize * math.prod(spec) for spec, dtype in self.tensor_specs(shape, rank).values())


def quantize_factors(factors: Factors, form: FactorFormat) -> dict[str, Tensor]:
    """Round both factors, each by itself; `refit_factors` in factor_refit.py lets one make up for the other.

    Returns:
        Tensors as in `FactorFormat.tensor_specs`.
    Raises:
        ValueError: a factor has a NaN or an infinity.
    """
    return quantize_out(factors.out, form) | quantize_into(factors.into, form)


def quantize_out(
    out: Float32[Tensor, "out rank"], form: FactorFormat, row_weights: Float32[Tensor, " out"] | None = None
) -> dict[str, Tensor]:
    """The tensors of L1 alone; see `quantize_factors`."""
    _check_finite(out, "L1")
    if form.bits == 16:
        return {OUT: out.to(torch.bfloat16).contiguous()}
    return _quantize(OUT, out.T.contiguous(), form.bits, row_weights)


def quantize_into(
    into: Float32[Tensor, "rank in"], form: FactorFormat, column_weights: Float32[Tensor, " in"] | None = None
) -> dict[str, Tensor]:
    """The tensors of L2 alone; see `quantize_factors`."""
    _check_finite(into, "L2")
    if form.bits == 16:
        return {INTO: into.to(torch.bfloat16).contiguous()}
    return _quantize(INTO, into, form.bits, column_weights)


def dequantize_factors(stored: dict[str, Tensor], form: FactorFormat, shape: tuple[int, int], rank: int) -> Factors:
    """L1 and L2 in float32 from the tensors of `quantize_factors`.

    Raises:
        ValueError: a tensor is missing or has another shape or dtype than `form` says.
    """
    for name, (expected, dtype) in form.tensor_specs(shape, rank).items():
        found = (tuple(stored[name].shape), stored[name].dtype) if name in stored else "nothing"
        if found != (expected, dtype):
            raise ValueError(
                f"Factors of {form.bits} bits and rank {rank} for shape {shape} need {name} as {(expected, dtype)}, "
                f"but {found} is there; check that format, shape and rank are those they were stored with."
            )
    if form.bits == 16:
        return Factors(stored[OUT].float(), stored[INTO].float())
    rows, columns = shape
    return Factors(
        _dequantize(OUT, stored, form.bits, rank, rows).T, _dequantize(INTO, stored, form.bits, rank, columns)
    )


def dequantize_into(
    stored: dict[str, Tensor], form: FactorFormat, shape: tuple[int, int], rank: int
) -> Float[Tensor, "rank in"]:
    """L2 alone, in bfloat16 where that is how it is stored, else in float32; shapes are not checked."""
    return stored[INTO] if form.bits == 16 else _dequantize(INTO, stored, form.bits, rank, shape[1])


def rounded(components: Float32[Tensor, "components n"], form: FactorFormat) -> Float32[Tensor, "components n"]:
    """Rows of L2, or columns of L1 as rows, as they are read again once `quantize_factors` has stored them.

    Components do not depend on one another, so those of many matrices may come together.
    """
    if form.bits == 16:
        return components.to(torch.bfloat16).float()
    codes, scales = _codes_and_scales(components, form.bits, None)
    return codes * spread(scales.float(), BLOCK_SIZE, components.shape[1])


def _quantize(
    name: str, components: Float32[Tensor, "rank n"], bits: int, weights: Float32[Tensor, " n"] | None
) -> dict[str, Tensor]:
    codes, scales = _codes_and_scales(components, bits, weights)
    unsigned = (codes + largest_code(bits)).to(torch.uint8)
    return {f"{name}_packed": pack(unsigned.reshape(-1), bits), f"{name}_scale": scales}


def _codes_and_scales(
    components: Float32[Tensor, "components n"], bits: int, weights: Float32[Tensor, " n"] | None
) -> tuple[Int32[Tensor, "components n"], BFloat16[Tensor, "components blocks"]]:
    count, length = components.shape
    blocks = to_blocks(components, BLOCK_SIZE)
    if weights is not None:
        weights = to_blocks(weights.expand(count, length), BLOCK_SIZE).reshape(-1, BLOCK_SIZE)
    quantized = quantize_uniform(blocks.reshape(-1, BLOCK_SIZE), weights, bits)
    return quantized.codes.view(count, -1)[:, :length], quantized.scales.view(count, -1)


def _dequantize(name: str, stored: dict[str, Tensor], bits: int, rank: int, length: int) -> Float32[Tensor, "rank n"]:
    packed, scales = stored[f"{name}_packed"], stored[f"{name}_scale"].float()
    levels = torch.arange(2**bits, dtype=torch.float32, device=packed.device) - largest_code(bits)
    codes = look_up(packed, bits, rank * length, levels).view(rank, length)
    return codes * spread(scales, BLOCK_SIZE, length)


def _check_finite(factor: Tensor, name: str) -> None:
    if not bool(torch.isfinite(factor).all()):
        raise ValueError(f"{name} has a NaN or an infinity; check the residual and the damping of its weighting.")
