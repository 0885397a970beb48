"""Where bitsmith keeps what outlives a command: the registry, converted models, unfinished work.

$BITSMITH_HOME (default ~/.bitsmith)
    registry/            versions and step results, content-addressed
    converted/<sha256>/  GGUF files turned into safetensors folders once
    logits/              what originals answer to evaluation texts, see base_logits.py
"""

import os
from pathlib import Path

from pipeline.errors import RecipeError


def home() -> Path:
    """The folder named by `BITSMITH_HOME`, or `~/.bitsmith`; not created here."""
    return expanded(os.environ.get("BITSMITH_HOME") or "~/.bitsmith")


def expanded(path: str | Path) -> Path:
    """With a home folder in the place of `~`.

    Raises:
        RecipeError: nobody has that name here.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{path} names the home folder of nobody who is known here. Write the whole path.") from error


def output_path(path: str | Path) -> Path:
    """The same, with a name of its own: `.` has none. Raises RecipeError."""
    found = expanded(path)
    return found if found.name not in ("", "..") else found.resolve()
