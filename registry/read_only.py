"""A registry that this process may not write, such as a read-only mount: it is read through a copy of its index.

SQLite writes beside its file even to read. What is written to the copy is lost; but whatever changes a registry also
writes a record or a blob, and there the file system refuses it.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from registry.errors import RegistryError
from registry.store import disk_errors

TRIES = 10


def is_writable(root: Path) -> bool:
    """May this process write into the registry?"""
    return os.access(root, os.W_OK)


def copy_at_rest(path: Path, folder: Path) -> None:
    """Copy a SQLite database, and what is not yet merged into it, into `folder`; again while somebody writes it.

    Raises:
        RegistryError: the disk refuses, or somebody always writes.
    """
    parts = [path, path.with_name(f"{path.name}-wal")]
    with disk_errors(path):
        for _ in range(TRIES):
            before = [_state(part) for part in parts]
            for part, state in zip(parts, before, strict=True):
                (folder / part.name).unlink(missing_ok=True)
                if state is not None:
                    with suppress(FileNotFoundError):
                        shutil.copyfile(part, folder / part.name)
            if [_state(part) for part in parts] == before:
                return
            time.sleep(0.1)
    raise RegistryError(f"{path} was written all the time while it was to be read. Run the command again.")


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
