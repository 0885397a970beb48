"""Experts that no token of the calibration text reached, whose own statistics are all zero.

Zeros would say that their errors cost nothing, and the integer program would give them the fewest bits there are. All
that is known of them is that the layer's other experts do the same work: so they get the mean over the layer's experts,
to which they add nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.curvature_sums import Sums
from pipeline.experts import EXPERT_NUMBER
from pipeline.model import Matrix
from pipeline.summed_parts import layer_file, num_windows_of, owner_of, write_layer

MOST_NAMED = 5


def fill_idle(matrices: Iterable[Matrix], folder: Path, sums: Sums, say: Callable[[str], None]) -> None:
    """Give them the mean, in the layers' files of complete sums (summed_parts.py), and name them."""
    idle: list[str] = []
    for layer, members in groupby(matrices, key=lambda matrix: matrix.layer):
        experts = [matrix for matrix in members if EXPERT_NUMBER.search(matrix.name)]
        if not experts:
            continue
        path = folder / layer_file(layer)
        held, num_windows = load_file(path), num_windows_of(path)
        found = [matrix for matrix in experts if not any(bool(held[key].any()) for key in _keys(matrix, sums))]
        idle += [matrix.name for matrix in found]
        means: dict[str, Tensor] = {}
        for matrix in found:
            for key in _keys(matrix, sums):
                part = EXPERT_NUMBER.sub(".", key)
                if part not in means:
                    others = [name for name in held if EXPERT_NUMBER.sub(".", name) == part]
                    means[part] = sum((held[name] for name in others), torch.zeros_like(held[key])) / len(others)
        held |= {key: means[EXPERT_NUMBER.sub(".", key)] for matrix in found for key in _keys(matrix, sums)}
        if found:
            write_layer(path, {name: tensor.clone() for name, tensor in held.items()}, num_windows)
    if idle:
        shown = ", ".join(idle[:MOST_NAMED]) + (f" and {len(idle) - MOST_NAMED} more" if len(idle) > MOST_NAMED else "")
        say(
            f"The calibration text reached none of these experts: {shown}. They are treated as the mean of the layer's "
            "others; more or other text (--num-samples, --dataset) would tell more."
        )


def _keys(matrix: Matrix, sums: Sums) -> list[str]:
    return [f"{owner_of(matrix, sums)}.{name}" for name in sums.shapes(matrix.shape)]


def with_others_scales(scales: dict[str, float]) -> dict[str, float]:
    """By parameter name; an expert's that is 0 is the mean of those of the layer's others that are not, or 1."""
    known: dict[str, list[float]] = defaultdict(list)
    for name, scale in scales.items():
        if scale > 0:
            known[EXPERT_NUMBER.sub(".", name)].append(scale)

    def others(name: str) -> float:
        found = known[EXPERT_NUMBER.sub(".", name)]
        return sum(found) / len(found) if found else 1.0

    return {
        name: others(name) if EXPERT_NUMBER.search(name) and scale == 0 else scale for name, scale in scales.items()
    }
