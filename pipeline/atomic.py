"""Files that are there whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry.kept_work import note


def replace_file(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `target`, bring it to the disk, and rename it over `target`.

    In the folder of a step its hash is noted, so that a later process goes on from what is as it was left.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        note(target, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(target: Path, content: Any) -> None:
    """`content` as sorted, indented JSON, the same bytes for the same content."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(target, lambda path: path.write_text(text, encoding="utf-8"))
