"""What all commands share: the registry at hand, progress or silence, results as JSON."""

import json
import os
import sys
from typing import Any

from pipeline.display import Bars
from pipeline.errors import RecipeError
from pipeline.home import home
from pipeline.progress import SILENT, Progress
from registry import Registry, Version


def open_registry() -> Registry:
    """The one in `home()`."""
    return Registry(home() / "registry")


def progress_of(quiet: bool) -> Progress:
    """Bars on standard error, or nothing."""
    return SILENT if quiet else Bars()


def quiet_hub(quiet: bool) -> None:
    """The Hub's client draws bars of its own; not if `quiet`, and not into a file."""
    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def read_secret(variable: str | None, what: str) -> str | None:
    """A password or a token from that environment variable: no secret stands in a command line."""
    if variable is None:
        return None
    if (secret := os.environ.get(variable)) is None:
        raise RecipeError(f"The environment has no {variable} with {what}. Set it.")
    return secret


def version_json(version: Version) -> dict[str, Any]:
    """A version as the commands print it."""
    return {
        "name": version.name,
        "version": version.number,
        "digest": version.digest,
        "created_at": version.created_at,
        "note": version.note,
    }


def print_json(content: Any) -> None:
    """On standard output, for machines."""
    sys.stdout.write(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
