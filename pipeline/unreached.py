"""Matrices of which the calibration text tells nothing: no token reached them, or no gradient. Their sums are all zero.

Zeros would say that their errors cost nothing, and the integer program would give them the fewest bits there are. Of an
expert it is known that the layer's others do the same work: so it gets the mean over the layer's experts, to which it
adds nothing. Of any other matrix nothing is known, and all its errors count alike, as much as those of the model's
others on average.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.atomic import write_json
from pipeline.curvature_sums import Sums
from pipeline.experts import EXPERT_NUMBER
from pipeline.model import Matrix
from pipeline.summed_parts import layer_file, num_windows_of, owner_of, write_layer

MOST_NAMED = 5


def fill_unreached(matrices: Sequence[Matrix], folder: Path, sums: Sums, say: Callable[[str], None]) -> None:
    """Fill in their sums, in the layers' files of complete sums (summed_parts.py), and name them.

    Which they are is written beside `folder` before the first of them changes: a call after a kill fills in the same.
    """
    by_layer = {layer: list(members) for layer, members in groupby(matrices, key=lambda matrix: matrix.layer)}
    known = folder.parent / "unreached.json"
    if not known.exists():
        zeros = [
            matrix.name
            for layer, members in by_layer.items()
            for matrix in _zeros(folder / layer_file(layer), members, sums)
        ]
        write_json(known, zeros)
    zero = set(json.loads(known.read_text(encoding="utf-8")))
    if idle := _fill_experts(by_layer, folder, sums, zero):
        say(
            f"The calibration text reached none of these experts: {_some(idle)}. They are treated as the mean of the "
            "layer's others; more or other text (--num-samples, --dataset) would tell more."
        )
    if unreached := _fill_others(by_layer, folder, sums, zero - set(idle)):
        say(
            f"The calibration text tells nothing about {_some(unreached)}: no gradient reaches them, or their inputs "
            "are zero. Their errors count as much as those of the other matrices do on average; if the model takes no "
            "notice of them, an --override with few bits saves some."
        )


def _fill_experts(by_layer: dict[int, list[Matrix]], folder: Path, sums: Sums, zero: set[str]) -> list[str]:
    """Those of layers in which some were reached."""
    filled: list[str] = []
    for layer, members in by_layer.items():
        experts = [matrix for matrix in members if EXPERT_NUMBER.search(matrix.name)]
        idle = [matrix for matrix in experts if matrix.name in zero]
        if not idle or len(idle) == len(experts):
            continue
        path = folder / layer_file(layer)
        held, num_windows = load_file(path), num_windows_of(path)
        keys = [key for matrix in idle for key in _keys(matrix, sums)]
        for key in keys:
            held[key] = torch.zeros_like(held[key])  # a killed call may have filled it in
        means: dict[str, Tensor] = {}
        for key in keys:
            part = EXPERT_NUMBER.sub(".", key)
            if part not in means:
                others = [name for name in held if EXPERT_NUMBER.sub(".", name) == part]
                means[part] = sum((held[name] for name in others), torch.zeros_like(held[key])) / len(others)
        held |= {key: means[EXPERT_NUMBER.sub(".", key)] for key in keys}
        write_layer(path, {name: tensor.clone() for name, tensor in held.items()}, num_windows)
        filled += [matrix.name for matrix in idle]
    return filled


def _fill_others(by_layer: dict[int, list[Matrix]], folder: Path, sums: Sums, zero: set[str]) -> list[str]:
    zeros = {layer: [matrix for matrix in members if matrix.name in zero] for layer, members in by_layer.items()}
    unreached = [matrix.name for found in zeros.values() for matrix in found]
    if not unreached or len(unreached) == sum(map(len, by_layer.values())):
        return []
    levels: list[float] = []
    for layer, members in by_layer.items():
        held = load_file(folder / layer_file(layer))
        reached = [matrix for matrix in members if matrix not in zeros[layer]]
        levels += [sums.level(_of(held, matrix, sums), matrix.shape) for matrix in reached]
    mean = sum(levels) / len(levels)
    for layer, found in zeros.items():
        if not found:
            continue
        path = folder / layer_file(layer)
        held, num_windows = load_file(path), num_windows_of(path)
        for matrix in found:
            even = sums.even(mean, matrix.shape)
            held |= {f"{owner_of(matrix, sums)}.{name}": tensor for name, tensor in even.items()}
        write_layer(path, {name: tensor.clone() for name, tensor in held.items()}, num_windows)
    return unreached


def _zeros(path: Path, matrices: Iterable[Matrix], sums: Sums) -> list[Matrix]:
    """Those of a layer whose sums are zero throughout. Of all others a row or two is read."""

    def is_zero(key: str) -> bool:
        rows = stored.get_slice(key)
        return not any(bool(rows[row : row + 1].any()) for row in range(rows.get_shape()[0]))

    with safe_open(path, framework="pt") as stored:
        return [matrix for matrix in matrices if all(is_zero(key) for key in _keys(matrix, sums))]


def _of(held: dict[str, Tensor], matrix: Matrix, sums: Sums) -> dict[str, Tensor]:
    return {name: held[f"{owner_of(matrix, sums)}.{name}"] for name in sums.shapes(matrix.shape)}


def _keys(matrix: Matrix, sums: Sums) -> list[str]:
    return [f"{owner_of(matrix, sums)}.{name}" for name in sums.shapes(matrix.shape)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")


def with_others_scales(scales: dict[str, float]) -> dict[str, float]:
    """By parameter name; one that is 0 is the mean of those of the layer's other experts, or else of all, or 1."""
    known: dict[str, list[float]] = defaultdict(list)
    for name, scale in scales.items():
        if scale > 0:
            known[EXPERT_NUMBER.sub(".", name)].append(scale)
    everything = [scale for scale in scales.values() if scale > 0] or [1.0]

    def others(name: str) -> float:
        found = known[EXPERT_NUMBER.sub(".", name)] or everything
        return sum(found) / len(found)

    return {name: scale if scale > 0 else others(name) for name, scale in scales.items()}
