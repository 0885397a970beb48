"""What the kernels compute, in plain torch: the meaning of the kernel layout, whose planes it reads bit by bit.

Q[n, k] = (level[code] - zero) * (offset + scale_code * step)
"""

import torch
from jaxtyping import Float
from torch import Tensor

from quantizers.blocks import spread
from quantizers.kernels.abstract_weight import KernelFactors
from quantizers.kernels.block_weight import BlockWeight
from quantizers.kernels.layout import FIELDS, LANES, PLANE_BITS, SUPERBLOCK
from quantizers.kernels.trellis_weight import TILE_WEIGHTS, TrellisWeight
from quantizers.trellis_format import TILE, from_tiles, num_tiles


def dequantize(weight: BlockWeight, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """Q, computed in float32."""
    rows, columns = weight.shape
    k = torch.arange(columns, device=weight.levels.device)
    sup, field, lane = k // SUPERBLOCK, k // LANES % FIELDS, k % LANES
    codes = torch.zeros(rows, columns, dtype=torch.int64, device=k.device)
    shift = 0
    for width, words in zip(PLANE_BITS[weight.form.bits], weight.planes, strict=True):
        word = words[:, sup, field * width // 32, lane].long()
        codes |= ((word >> (field * width % 32)) & (2**width - 1)) << shift
        shift += width
    steps = weight.steps.repeat_interleave(weight.form.super_block)[: weight.scale_codes.numel()]
    scales = weight.offset + weight.scale_codes * steps.view(weight.scale_codes.shape)
    values = weight.levels[codes]
    if weight.zeros is not None:
        values = values - spread(weight.zeros.float(), weight.form.block_size, columns)
    return (values * spread(scales, weight.form.block_size, columns)).to(dtype)


def product(
    x: Float[Tensor, "rows in"], weight: BlockWeight, factors: KernelFactors | None
) -> Float[Tensor, "rows out"]:
    """x Q^T + (x L2^T) L1^T, computed in float32."""
    dense = dequantize(weight, torch.float32)
    if factors is not None:
        dense = dense + factors.low_rank.product()
    return (x.float() @ dense.T).to(x.dtype)


def trellis_product(x: Float[Tensor, "rows in"], weight: TrellisWeight) -> Float[Tensor, "rows out"]:
    """x W'^T, computed in float32."""
    return (x.float() @ dequantize_trellis(weight, torch.float32).T).to(x.dtype)


def dequantize_trellis(weight: TrellisWeight, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The rotated weight: each state is read bit by bit from its tile's stream, around the end."""
    bits, state_bits = weight.form.bits, weight.form.state_bits
    step = torch.arange(TILE_WEIGHTS)[:, None]
    at = ((TILE_WEIGHTS - 1 - step) * bits + torch.arange(state_bits)) % (TILE_WEIGHTS * bits)
    stream_bits = (weight.words[:, :, None] >> torch.arange(32)) & 1
    states = (stream_bits.flatten(1)[:, at].long() << torch.arange(state_bits)).sum(2)
    tiles = (weight.levels[states] * weight.scale).view(*num_tiles(weight.shape), TILE, TILE)
    return from_tiles(tiles)[: weight.shape[0], : weight.shape[1]].to(dtype)
