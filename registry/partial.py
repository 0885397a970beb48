"""Files under way beside their target, `.<16 hex digits>.partial`: locked as long as their writer lives.

What a killed process left is known by its lock, which is free, and removed by who next writes there.
"""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from registry.errors import RegistryError

_PARTIAL = re.compile(r"\.[0-9a-f]{16}\.partial")


@contextmanager
def temporary_beside(target: Path, root: Path) -> Iterator[Path]:
    """An empty file in `target`'s folder to write to before the rename; folders below `root` are made.

    A folder on the way that is a link is refused, because it may lead out of `root`.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not target.parent.resolve().is_relative_to(root.resolve()):
        raise RegistryError(f"{target.parent} leads out of {root} through a link. Name an empty folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, descriptor = _locked_file(target.parent)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Remove what killed processes left under way in `folder`; what living ones write stays."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _PARTIAL.fullmatch(path.name):
                _remove_if_free(path)


def _remove_if_free(path: Path) -> None:
    with suppress(OSError):  # somebody else's, or gone by now
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


def _locked_file(folder: Path) -> tuple[Path, int]:
    while True:
        path = folder / f".{secrets.token_hex(8)}.partial"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks: nobody can lock it, so nobody removes it
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.exists():
            return path, descriptor
        os.close(descriptor)  # removed before it was locked
