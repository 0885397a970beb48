"""One process at a time, or many of one kind: advisory locks on files, which the system releases when a holder dies."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from registry.store import disk_errors


@contextmanager
def exclusive(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock on `path`, which is made and removed as needed.

    Args:
        on_wait: called once if another process or thread holds it, before waiting without limit.
    """
    with disk_errors(path):
        descriptor = _acquire(path, on_wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while we hold it: who waits sees that the file is another one now
        os.close(descriptor)


@contextmanager
def held_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock of `exclusive` if nobody does; whether it is held."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            is_ours = _is_still_at(descriptor, path)  # else its holder left, and the name is another's by now
            yield is_ours
            if is_ours:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextmanager
def flocked(path: Path, *, exclusively: bool) -> Iterator[None]:
    """Hold the lock on `path` alone, or with all others who do not want it alone; the file stays."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if exclusively else fcntl.LOCK_SH)
        except OSError:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(path: Path, on_wait: Callable[[], None]) -> int:
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waited:
                on_wait()
            waited = True
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_still_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
