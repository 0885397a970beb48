"""Tile sizes of the kernels, by card: a table, so that nothing is tuned at start-up.

`python -m benchmarks.kernels --tune` prints the row of the card it runs on. No card was measured yet, so every
card gets the default, which was chosen without one.
"""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs; all numbers but num_stages are powers of two.

    Attributes:
        rows, columns: of the weight, in a tile: whole superblocks of 256 columns, or whole tiles of a trellis. Feedback
            from column to column goes through blocks as wide as they are, and the search of scales through so many
            weights, in whatever blocks.
        num_warps, num_stages: see `triton.Config`.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


DEFAULT = "any card"
CONFIGS: dict[str, dict[str, Config]] = {
    DEFAULT: {
        "dequantize": Config(rows=8, columns=1024, num_warps=4, num_stages=1),
        "matvec": Config(rows=8, columns=1024, num_warps=4, num_stages=2),
        "matmul": Config(rows=64, columns=256, num_warps=4, num_stages=2),
        "trellis": Config(rows=16, columns=512, num_warps=8, num_stages=1),
        "trellis_product": Config(rows=64, columns=256, num_warps=8, num_stages=1),
        "column_feedback": Config(rows=32, columns=1, num_warps=4, num_stages=1),
        "scale_search": Config(rows=1, columns=2048, num_warps=4, num_stages=1),
    },
    # Triton's interpreter, which takes a program's time whatever its size
    "cpu": {
        "dequantize": Config(rows=64, columns=512, num_warps=4, num_stages=1),
        "matvec": Config(rows=64, columns=512, num_warps=4, num_stages=1),
        "matmul": Config(rows=64, columns=256, num_warps=4, num_stages=1),
        "trellis": Config(rows=16, columns=256, num_warps=4, num_stages=1),
        "trellis_product": Config(rows=64, columns=64, num_warps=4, num_stages=1),
        "column_feedback": Config(rows=32, columns=1, num_warps=4, num_stages=1),
        "scale_search": Config(rows=1, columns=2048, num_warps=4, num_stages=1),
    },
}
PROGRAMS_A_MULTIPROCESSOR = 4
MOST_SPLITS = 16


def config_of(kernel: str, device: torch.device) -> Config:
    """The table's row for the card, or the default."""
    return CONFIGS.get(_card(device)[0], CONFIGS[DEFAULT])[kernel]


def num_splits(num_row_tiles: int, num_column_tiles: int, device: torch.device) -> int:
    """Programs that share the columns of a tile of rows: as many as keep the card busy, at least a tile each."""
    wanted = PROGRAMS_A_MULTIPROCESSOR * _card(device)[1] // num_row_tiles
    return max(1, min(wanted, num_column_tiles, MOST_SPLITS))


@functools.cache
def _card(device: torch.device) -> tuple[str, int]:
    """Name and multiprocessors; the interpreter's CPU counts as one."""
    if device.type != "cuda":
        return device.type, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count
