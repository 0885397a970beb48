"""What of a model's folder a checkpoint takes over beside config and weights: tokenizer, licence, code of its own."""

import json
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.own_code import REFERRING_FILES, code_files
from pipeline.sources import EXTRA_FILES


def extra_files(folder: Path, *, with_code: bool) -> list[str]:
    """Paths in the folder, sorted."""
    paths = {path for pattern in EXTRA_FILES for path in folder.glob(pattern) if path.is_file()}
    code = code_files(folder) if with_code else []
    return sorted({*(path.relative_to(folder).as_posix() for path in paths), *code})


def check_extra_files(folder: Path, names: Iterable[str]) -> None:
    """Raise ModelError if one lies elsewhere, and would be published with the checkpoint, or cannot be rewritten."""
    top = folder.resolve()
    roots = [top, top.parent.parent / "blobs"] if top.parent.name == "snapshots" else [top]  # the Hub's cache has links
    for name in names:
        there = (folder / name).resolve()
        if not any(there.is_relative_to(root) for root in roots):
            raise ModelError(
                f"{folder / name} is a link to {there}, which is not in the model's folder. What it holds would become "
                "part of the checkpoint, and be published with it: put a copy of it there if that is meant."
            )
        if name in REFERRING_FILES:
            _check_object(folder / name)


def _check_object(path: Path) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no JSON object ({error}). Download the model again.") from error
