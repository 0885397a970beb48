"""Experts that no token of the calibration text reached, whose own statistics are all zero.

Zeros would say that their errors cost nothing, and the integer program would give them the fewest bits there are. All
that is known of them is that the layer's other experts do the same work: so they get the mean of these.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pipeline.curvature_sums import Sums
from pipeline.model import Matrix
from pipeline.summed_parts import layer_file, owner_of

NUMBERED = re.compile(r"\.experts\.\d+\.")
MOST_NAMED = 5


def is_expert(matrix: Matrix) -> bool:
    """Is it of a mixture's expert?"""
    return NUMBERED.search(matrix.name) is not None


def is_idle(sums: dict[str, Tensor]) -> bool:
    """Did nothing add to them?"""
    return not any(bool(tensor.any()) for tensor in sums.values())


def mean_of_others(matrix: Matrix, stored: Any, sums: Sums) -> dict[str, Tensor]:
    """The mean of the sums of all experts that have the same part of the layer; zeros where all are idle.

    Args:
        stored: the layer's opened file of sums.
    """
    before, after = NUMBERED.split(owner_of(matrix, sums), maxsplit=1)
    found = {}
    for name in sums.shapes(matrix.shape):
        pattern = re.compile(f"{re.escape(before)}{NUMBERED.pattern}{re.escape(after)}{re.escape('.' + name)}")
        others = [key for key in stored.keys() if pattern.fullmatch(key)]  # noqa: SIM118
        total = None
        for key in others:
            tensor = stored.get_tensor(key)
            total = tensor if total is None else total.add_(tensor)
        assert total is not None, "the matrix's own sums are among them"
        found[name] = total / len(others)
    return found


def with_others_scales(scales: dict[str, float]) -> dict[str, float]:
    """By parameter name; an expert's that is 0 is the mean of those of the layer's others that are not, or 1."""
    known: dict[str, list[float]] = defaultdict(list)
    for name, scale in scales.items():
        if scale > 0:
            known[NUMBERED.sub(".", name)].append(scale)

    def others(name: str) -> float:
        found = known[NUMBERED.sub(".", name)]
        return sum(found) / len(found) if found else 1.0

    return {name: others(name) if NUMBERED.search(name) and scale == 0 else scale for name, scale in scales.items()}


def say_idle(matrices: Iterable[Matrix], folder: Path, sums: Sums, say: Callable[[str], None]) -> None:
    """Name the matrices whose statistics are those of others."""
    idle = []
    for matrix in filter(is_expert, matrices):
        with safe_open(folder / layer_file(matrix.layer), framework="pt") as stored:
            names = sums.shapes(matrix.shape)
            if is_idle({name: stored.get_tensor(f"{owner_of(matrix, sums)}.{name}") for name in names}):
                idle.append(matrix.name)
    if idle:
        shown = ", ".join(idle[:MOST_NAMED]) + (f" and {len(idle) - MOST_NAMED} more" if len(idle) > MOST_NAMED else "")
        say(
            f"The calibration text reached none of these experts: {shown}. They are treated as the mean of the layer's "
            "others; more or other text (--num-samples, --dataset) would tell more."
        )
