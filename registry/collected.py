"""What a garbage collection removed."""

from dataclasses import dataclass
from pathlib import Path

from registry.artifact import Artifact


@dataclass(frozen=True)
class Collected:
    """What was removed, or would be.

    Attributes:
        artifacts: forgotten.
        num_blobs: that no artifact names, or that were never finished.
        folders: of steps and downloads that nobody goes on with.
        size_bytes: of blobs and folders.
    """

    artifacts: tuple[Artifact, ...]
    num_blobs: int
    folders: tuple[Path, ...]
    size_bytes: int
