"""The sums over all windows, from sums over parts of them: added in the order of the parts, whoever made which, when.

layer-NNN.safetensors    the sums of the layer's matrices over the parts so far, and in its metadata how many windows
                         these are

Float32 sums depend on their order. Fixed parts, added in order, give the same bytes in one process and on many
machines. A part that is collected here is added layer by layer, as soon as each is known: so the sums of a large model,
tens of gigabytes, are on the disk once.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
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

    def add(self, part: range, sums_of_layer: Callable[[int], dict[str, Tensor]]) -> None:
        """Add the next part. After a kill in the middle, the same call goes on where it was.

        Args:
            part: its windows.
            sums_of_layer: the part's sums of one layer.
        """
        for layer in self.layers:
            if self._num_done(layer) < part.stop:
                self.add_layer(part, layer, sums_of_layer(layer))

    def add_layer(self, part: range, layer: int, sums: dict[str, Tensor]) -> None:
        """Add the next part of one layer, unless that was done before; `sums` become those with the parts before."""
        path, num_done = self.folder / layer_file(layer), self._num_done(layer)
        if num_done >= part.stop:
            return
        assert num_done == part.start, f"{path} is of {num_done} windows, and those from {part.start} are to be added"
        if num_done:
            with safe_open(path, framework="pt") as stored:
                for name, tensor in sums.items():
                    tensor.add_(stored.get_tensor(name))
        write_layer(path, sums, part.stop)

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
