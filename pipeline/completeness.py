"""Whether the stored tensors are those that the architecture needs, before any work is spent on them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ModelError
from pipeline.shards import TensorInfo
from pipeline.stored_names import StoredNames
from pipeline.structure import Structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_complete(
    path: Path, structure: Structure, names: StoredNames, skeleton: "PreTrainedModel", stored: set[str]
) -> None:
    """Raise `ModelError` if a parameter that `skeleton` needs is neither stored, tied, nor made of others.

    Args:
        stored: names of the parameters that are.
    """
    present = set(stored)
    present |= {source for target, source in structure.ties.items() if target in present}
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_missing or ()]
    missing = sorted(
        name
        for name in structure.required - present
        if not names.produces(name) and not any(pattern.search(name) for pattern in ignored)
    )
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(
            f"The weights in {path} lack {len(missing)} of the {len(structure.required)} tensors that "
            f"{type(skeleton).__name__} needs: {shown}. transformers would fill them with random numbers. "
            "Check that config.json belongs to these weights, and download the model again."
        )


def check_shapes(path: Path, structure: Structure, tensors: dict[str, TensorInfo]) -> None:
    """Raise `ModelError` at the first tensor whose stored shape is not the architecture's."""
    for name, info in tensors.items():
        expected = structure.shapes.get(name)
        if expected is not None and info.shape != expected:
            raise ModelError(
                f"{info.name} in {path / info.file} has shape {list(info.shape)}, but config.json asks for "
                f"{list(expected)}. The config and the weights do not belong together: download both again."
            )
