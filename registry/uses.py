"""What live processes may still need: what they added, and the results of steps that they made or found. It is kept
from being collected, whatever the clocks say.

uses/<random>    one a process, locked as long as it lives: a digest a line
"""

import fcntl
import os
import secrets
from pathlib import Path

from registry.store import disk_errors


class Uses:
    """The list of this process in `folder`, which is made with the first digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / secrets.token_hex(16)
        self._descriptor: int | None = None
        self._process = os.getpid()
        self._known: set[str] = set()

    def add(self, *digests: str) -> None:
        """Note that this process needs these artifacts, and what they were made from, until it ends."""
        new = set(digests) - self._known
        if not new:
            return
        with disk_errors(self._folder):
            if self._descriptor is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            os.write(self._descriptor, "".join(f"{digest}\n" for digest in sorted(new)).encode())
        self._known |= new

    def close(self) -> None:
        """Need nothing any more. What a kill leaves, `digests_in_use` removes."""
        if self._descriptor is not None:
            if self._process == os.getpid():  # a fork's copy goes before the process that it came from
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
        self._descriptor, self._known = None, set()

    def __del__(self) -> None:
        self.close()


def digests_in_use(folder: Path) -> set[str]:
    """What living processes noted in `folder`; lists of dead ones are removed."""
    found: set[str] = set()
    with disk_errors(folder):
        for path in folder.glob("*"):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # its process has ended just now
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                found.update(path.read_text().split())
            finally:
                os.close(descriptor)
    return found
