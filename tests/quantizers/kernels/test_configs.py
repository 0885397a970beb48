"""Tile sizes: a card that nobody measured works, and programs that share columns are never idle."""

import pytest
import torch

from quantizers.kernels import configs
from quantizers.kernels.configs import CONFIGS, DEFAULT, config_of, num_splits

KERNELS = ("dequantize", "matvec", "matmul", "trellis", "trellis_product", "column_feedback", "scale_search")
CPU = torch.device("cpu")


@pytest.mark.parametrize("card", CONFIGS)
def test_every_row_has_every_kernel(card: str) -> None:
    assert set(CONFIGS[card]) == set(KERNELS)
    for config in CONFIGS[card].values():
        for size in (config.rows, config.columns, config.num_warps):
            assert size > 0
            assert size & (size - 1) == 0


def test_an_unknown_card_gets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_card", lambda device: ("NVIDIA Z1", 200))
    assert [config_of(kernel, CPU) for kernel in KERNELS] == [CONFIGS[DEFAULT][kernel] for kernel in KERNELS]


def test_splits_fill_the_card_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_card", lambda device: ("a card", 132))
    for row_tiles in (1, 7, 64, 512, 10_000):
        for column_tiles in (1, 3, 16, 112):
            splits = num_splits(row_tiles, column_tiles, CPU)
            assert 1 <= splits <= min(column_tiles, configs.MOST_SPLITS)
            assert splits == 1 or row_tiles * splits <= configs.PROGRAMS_A_MULTIPROCESSOR * 132
    assert num_splits(64, 16, CPU) == 8
