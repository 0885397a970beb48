"""Codes on a CPU by compiled loops, where numba is installed: several times sooner than torch.

They are products with packed weights (cpu_loops.py) and the search for the codes of a trellis (cpu_viterbi.py). Each
function gives None where the loops do not serve: without numba, on other devices, for few weights, for which loading
numba would take longer, for products of many rows, where dense products pay, where a gradient is to flow, and inside
of torch.compile. Its callers then do the same with torch, which stays the reference.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64, UInt8
from torch import Tensor

from quantizers.packing import WORD_BITS, num_words

LEAST_WEIGHTS = 2**16
LEAST_COSTS = 2**28  # of states of a trellis, that a process finds with torch: about two seconds
COSTS_A_CALL = 2**23  # that torch finds in the time which its smallest search takes
COSTS_A_WEIGHT = 16
SEARCH_BYTES = 2**25  # of costs, that a thread keeps once it has searched
MOST_ROWS = 8  # of a product
WEIGHTS_A_THREAD = 2**16  # fewer are not worth waking another


def block_product(
    x: Float[Tensor, "... columns"],
    stored: dict[str, Tensor],
    shape: tuple[int, int],
    levels: Float32[Tensor, " levels"],
    *,
    bits: int,
    block_size: int,
    scale_bits: int,
    super_block: int,
) -> Float[Tensor, "... rows"] | None:
    """x Q^T in the dtype of `x`, with Q as abstract_block_format.py says, summed in float32; rows are whole words.

    Raises:
        ValueError: a stored tensor has not the size that `shape` takes.
    """
    if torch.compiler.is_compiling():  # the number of rows would become a constant
        return None
    flat = x.detach().reshape(-1, x.shape[-1])
    if len(flat) > MOST_ROWS or (torch.is_grad_enabled() and x.requires_grad):  # numba is not even loaded for it
        return None
    loops = _loops_for(stored["weight_packed"], shape, flat, levels)
    if loops is None or shape[1] % WORD_BITS or block_size % loops.HALF:
        return None
    num_scales = shape[0] * -(-shape[1] // block_size)
    _require(stored["weight_packed"], num_words(shape[0] * shape[1], bits))
    _require(levels, 2**bits)
    _require(stored["weight_scale_packed"], num_words(num_scales, scale_bits))
    _require(stored["weight_scale_step"], -(-num_scales // super_block))
    y = _empty(len(flat), shape[0])
    loop = functools.partial(
        loops.PRODUCT_BLOCKS[bits],
        *(_words(stored["weight_packed"]), _array(levels), _words(stored["weight_scale_packed"]), scale_bits),
        *(_array(stored["weight_scale_step"]), super_block, np.float32(stored["weight_scale_offset"].item())),
        *(block_size, _array(flat.float()), y.numpy()),
    )
    is_done = _over_rows(shape[0], shape[0] * shape[1], loop)
    return y.to(x.dtype).view(*x.shape[:-1], shape[0]) if is_done else None


def decoded_tiles(
    words: Int32[Tensor, " words"],
    tile_bits: Int64[Tensor, "rows columns"],
    state_bits: dict[int, int],
    levels: Float32[Tensor, " states"],
    scale: Float32[Tensor, " 1"],
    shape: tuple[int, int],
) -> Float32[Tensor, "out in"] | None:
    """levels[states] * scale of a weight of `shape` in tiles, the same numbers as torch's.

    Args:
        tile_bits: of a symbol, for each tile.
        state_bits: of a state, by bits of a symbol; `levels` are those of all of these, in this order.
    Raises:
        ValueError: the number of words or levels is not the one that the tiles take.
    """
    loops = _loops_for(words, shape, None, levels)
    if loops is None:
        return None
    rows, columns = tile_bits.shape
    out = _empty(rows * loops.TILE, columns * loops.TILE)
    arguments = _tiles(loops, words, tile_bits, state_bits, levels, scale, shape)
    is_done = _over_rows(rows, out.numel(), functools.partial(loops.decode_tiles, *arguments, out.numpy()))
    return out[: shape[0], : shape[1]] if is_done else None


def tile_product(
    x: Float[Tensor, "... in"],
    words: Int32[Tensor, " words"],
    tile_bits: Int64[Tensor, "rows columns"],
    state_bits: dict[int, int],
    levels: Float32[Tensor, " states"],
    scale: Float32[Tensor, " 1"],
    shape: tuple[int, int],
) -> Float[Tensor, "... out"] | None:
    """x Q^T in the dtype of `x`, Q being what `decoded_tiles` gives, summed in float32."""
    if torch.compiler.is_compiling():  # the number of rows would become a constant
        return None
    flat = x.detach().reshape(-1, x.shape[-1])
    if len(flat) > MOST_ROWS or (torch.is_grad_enabled() and x.requires_grad):  # numba is not even loaded for it
        return None
    loops = _loops_for(words, shape, flat, levels)
    if loops is None:
        return None
    rows, columns = tile_bits.shape
    arguments = _tiles(loops, words, tile_bits, state_bits, levels, scale, shape)
    padded = torch.nn.functional.pad(flat.float(), (0, columns * loops.TILE - shape[1]))
    y = _empty(len(flat), rows * loops.TILE)
    loop = functools.partial(loops.product_tiles, *arguments, _array(padded), y.numpy())
    is_done = _over_rows(rows, shape[0] * shape[1], loop)
    return y[:, : shape[0]].to(x.dtype).reshape(*x.shape[:-1], shape[0]) if is_done else None


def closed_paths(
    values: Float32[Tensor, "sequence step"], levels: Float32[Tensor, " state"], bits: int, join: int
) -> UInt8[Tensor, "sequence step"] | None:
    """Symbols of the shortest closed paths through a trellis, the same as torch's (see trellis.py).

    Args:
        join: steps on either side of a sequence's ends that decide how the ends join.
    """
    costs = values.numel() * len(levels)
    loops = _loops_serving(values, levels) if _searched.pays(costs) else None
    if loops is None:
        return None
    from quantizers import cpu_viterbi

    symbols = torch.empty(values.shape, dtype=torch.uint8, device="cpu")
    lanes = cpu_viterbi.num_lanes(len(values), values.shape[1], len(levels) >> bits)
    arguments = (_array(values), _array(levels), join, lanes, symbols.numpy())
    loop = functools.partial(cpu_viterbi.SEARCHES[bits], *arguments)
    return symbols if _over_rows(-(-len(values) // lanes), costs // COSTS_A_WEIGHT, loop) else None


def _tiles(
    loops: ModuleType,
    words: Tensor,
    tile_bits: Tensor,
    state_bits: dict[int, int],
    levels: Tensor,
    scale: Tensor,
    shape: tuple[int, int],
) -> tuple[Any, ...]:
    """What all loops over tiles begin with."""
    if tuple(tile_bits.shape) != (-(-shape[0] // loops.TILE), -(-shape[1] // loops.TILE)):
        raise ValueError(f"{shape} weights are not in {tuple(tile_bits.shape)} tiles; the file is damaged")
    words_a_bit = loops.TILE**2 // WORD_BITS
    widths = tile_bits.reshape(-1)
    _require(words, words_a_bit * int(widths.sum()))
    _require(levels, sum(2**bits for bits in state_bits.values()))
    by_bits, first = np.zeros((2, max(state_bits) + 1), dtype=np.int64), 0
    for bits, of_state in state_bits.items():
        by_bits[:, bits] = of_state, first
        first += 2**of_state
    starts = words_a_bit * (widths.cumsum(0) - widths)
    of_tiles = (_words(words), starts.numpy(), widths.numpy(), by_bits[0], _array(levels), by_bits[1])
    return (*of_tiles, np.float32(scale.item()))


def loads_for(kind: str, num_weights: int) -> bool:
    """Is numba loaded (for good, with tens of megabytes) when a weight of that format is decoded on a CPU?"""
    return "trellis" in kind and num_weights >= LEAST_WEIGHTS and is_there()


def is_there() -> bool:
    """Is numba installed, and not known to fail?"""
    return not _given_up and importlib.util.find_spec("numba") is not None


@functools.cache
def _loops() -> ModuleType | None:
    try:
        from quantizers import cpu_loops, cpu_viterbi  # noqa: F401
    except Exception as error:  # numba and LLVM raise all kinds; a NumPy that does not fit is an ImportError
        if not (isinstance(error, ModuleNotFoundError) and error.name == "numba"):
            _give_up(error)
        return None
    return cpu_loops


class _Searched:
    """How much of the search for codes this process has done with torch."""

    def __init__(self) -> None:
        self.costs = 0

    def pays(self, costs: int) -> bool:
        """Is so much more a reason to load numba?"""
        self.costs += costs + COSTS_A_CALL
        return self.costs >= LEAST_COSTS


_searched = _Searched()
_given_up: list[str] = []
_ready: set[Callable[..., None]] = set()


def _give_up(error: Exception) -> None:
    """No loop is tried again in this process."""
    _given_up.append(f"{type(error).__name__}: {str(error)[:500]}")
    warnings.warn(
        f"numba does not work here ({_given_up[-1]}); packed weights are decoded, and codes are searched for, by "
        "torch, with the same results, but slowly. Another version of numba may help, or NUMBA_CACHE_DIR=FOLDER with a "
        "new folder for what it compiled",
        RuntimeWarning,
        stacklevel=3,
    )


def _loops_for(words: Tensor, shape: tuple[int, int], x: Tensor | None, levels: Tensor) -> ModuleType | None:
    serves = shape[0] * shape[1] >= LEAST_WEIGHTS and levels.dtype == torch.float32
    if x is None:
        return _loops_serving(words, levels) if serves else None
    serves = serves and x.dtype in (torch.float32, torch.bfloat16, torch.float16) and x.shape[1] == shape[1]
    return _loops_serving(words, levels, x) if serves else None


def _loops_serving(*tensors: Tensor) -> ModuleType | None:
    if _given_up or torch.compiler.is_compiling():
        return None
    are_plain = all(type(each) is Tensor and each.device.type == "cpu" for each in tensors)  # not fake, for one
    return _loops() if are_plain else None


def _require(tensor: Tensor, size: int) -> None:
    """The loops trust sizes."""
    if tensor.numel() != size:
        raise ValueError(f"{size} numbers were expected, but {tensor.numel()} are there; the file is damaged")


def _words(words: Tensor) -> np.ndarray:
    if words.dtype != torch.int32:
        raise ValueError(f"codes are packed in int32, but {words.dtype} is there; the file is damaged")
    return _array(words).view(np.uint32)


def _empty(*shape: int) -> Float32[Tensor, "..."]:
    """Whatever the process's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="bitsmith")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay with the parent


def _over_rows(num_rows: int, num_weights: int, loop: functools.partial[None]) -> bool:
    """`loop(first, stop)` over all rows, on as many threads as torch would take; False if it does not work here."""
    if loop.func not in _ready:
        try:
            loop(0, 0)  # compiles it, or reads what another process did
        except MemoryError:
            raise
        except Exception as error:  # numba, LLVM, and a disk that is full or has half a file
            _give_up(error)
            return False
        _ready.add(loop.func)
    parts = max(1, min(torch.get_num_threads(), num_weights // WEIGHTS_A_THREAD, num_rows))
    bounds = [num_rows * part // parts for part in range(parts + 1)]
    here, waiting = [bounds[:2]], []
    for part in range(1, parts):
        try:
            waiting.append(_pool().submit(loop, *bounds[part : part + 2]))
        except RuntimeError:  # Python is about to end
            here.append(bounds[part : part + 2])
    for first, stop in here:
        loop(first, stop)
    for each in waiting:
        each.result()
    return True
