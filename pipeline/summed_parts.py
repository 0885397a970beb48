"""The sums over all windows, from sums over parts of them: added in the order of the parts, whoever made which, when.

layer-NNN.safetensors    the sums of the layer's matrices over the parts so far, and in its metadata how many windows
                         these are

Float32 sums depend on their order. Fixed parts, added in order, give the same bytes in one process and on many
machines.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.atomic import replace_file
from pipeline.curvature_sums import Sums
from pipeline.model import Matrix, Model

PART_WINDOWS = 8
FLOAT32_BYTES = 4


def parts_of(num_windows: int) -> list[range]:
    """The windows of each part."""
    return [range(first, min(first + PART_WINDOWS, num_windows)) for first in range(0, num_windows, PART_WINDOWS)]


class SummedParts:
    """In `folder`, which is made."""

    def __init__(self, folder: Path, layers: Iterable[int]) -> None:
        self.folder, self.layers = folder, list(layers)
        folder.mkdir(exist_ok=True)

    @property
    def num_done(self) -> int:
        """Windows of all complete parts."""
        return min(self._num_done(layer) for layer in self.layers)

    def add(self, sums_of_layer: Callable[[int], dict[str, Tensor]], num_done: int) -> None:
        """Add the next part. After a kill in the middle, the same call goes on where it was.

        Args:
            sums_of_layer: the part's sums of one layer.
            num_done: windows with that part.
        """
        for layer in self.layers:
            if self._num_done(layer) >= num_done:
                continue
            path, sums = self.folder / layer_file(layer), sums_of_layer(layer)
            if path.exists():
                sums = {name: sums[name] + before for name, before in load_file(path).items()}
            write_layer(path, sums, num_done)

    def _num_done(self, layer: int) -> int:
        path = self.folder / layer_file(layer)
        return num_windows_of(path) if path.exists() else 0


def num_windows_of(path: Path) -> int:
    """Over how many windows the sums in a layer's file are."""
    with safe_open(path, framework="pt") as stored:
        return int(stored.metadata()["num_windows"])


def write_layer(path: Path, sums: dict[str, Tensor], num_windows: int) -> None:
    """The sums of one layer, over so many windows, as a file that is there whole or not at all."""
    metadata = {"num_windows": str(num_windows)}
    replace_file(path, lambda target: save_file(sums, target, metadata=metadata))


def layers_of(model: Model) -> list[int]:
    """Numbers of all layers that have matrices."""
    return sorted({matrix.layer for matrix in model.matrices})


def layer_file(layer: int) -> str:
    """Name of the file with a layer's sums."""
    return f"layer-{layer:03d}.safetensors"


def sum_bytes(matrices: Iterable[Matrix], sums: Sums) -> int:
    """Of the sums of these matrices, in float32."""
    shapes = {
        f"{owner_of(matrix, sums)}.{name}": shape
        for matrix in matrices
        for name, shape in sums.shapes(matrix.shape).items()
    }
    return sum(FLOAT32_BYTES * math.prod(shape) for shape in shapes.values())


def owner_of(matrix: Matrix, sums: Sums) -> str:
    """Whose the sums are: the matrix's, or its group's where they come from the input alone."""
    return matrix.group if sums.of_input_alone else matrix.name
