"""Garbage collection: remove what nobody needs.

Kept are, with all that they were made from,

    the artifact and the report of every version, so of every alias, its signatures and where it was published
    what living processes made or found in steps (uses.py)
    what was made, found or published within the grace

and the work of steps that a living process holds, or that was touched within the grace. The rest goes: artifacts from
the index first, then blobs that no artifact names, here and in the remote store. A kill between the two leaves blobs
for the next collection. Nobody adds to the registry while it is collected (`Database.collecting`).

Where the description of a version is lost, blobs that no artifact names may be its own, and stay.

Times are compared with the clock that wrote them, the database's or the file system's; those of the processes may
differ.
"""

import os
import shutil
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from registry.artifact import Artifact
from registry.collected import Collected
from registry.derived import disagreements
from registry.errors import RegistryError
from registry.index import Index
from registry.ledger import Ledger
from registry.lock import held_if_free
from registry.store import Store, disk_errors
from registry.uses import digests_in_use

_KEPT_WITH_PARENTS = {"signature", "publication"}


def collect(
    root: Path, store: Store, index: Index, ledger: Ledger, *, grace_seconds: float, dry_run: bool
) -> Collected:
    """Remove what the module's docstring says, or only tell; waits until nobody adds to the registry.

    Args:
        grace_seconds: what was used within this time stays.
    Raises:
        InvalidDescriptionError: a record is damaged, so that nobody knows what it names; `doctor` mends it.
        RegistryError: the disk or the database refuses; or the index says two things of what was made from what, which
            `doctor` mends.
    """
    oldest = _file_system_seconds(root) - grace_seconds
    with index.database.collecting():
        index.take_in_records()
        found = index.artifacts()
        _check_derived(index, ledger, [artifact for artifact, _ in found])
        with index.database.reading() as connection:
            used_since = index.database.now(connection).timestamp() - grace_seconds
        recent = (artifact for artifact, used_at in found if _seconds(used_at) >= used_since)
        needed = _needed(index, ledger, recent)
        needed |= _with_ancestors(index, digests_in_use(root / "uses"))
        needed |= {a.digest for a, _ in found if a.kind in _KEPT_WITH_PARENTS and needed.issuperset(a.parents)}
        doomed = tuple(artifact for artifact, _ in found if artifact.digest not in needed)
        wanted = _blobs_of(artifact for artifact, _ in found if artifact.digest in needed)
        named = _blobs_of(artifact for artifact, _ in found)
        kept: Container[str] = _AllBut(named - wanted) if index.lost() else wanted
        if not dry_run:
            index.forget_artifacts([artifact.digest for artifact in doomed])
        num_blobs, size_bytes = store.sweep(kept, oldest, dry_run=dry_run)
        folders = []
        for folder in _abandoned(root, oldest):
            folders.append(folder)
            size_bytes += _size_bytes(folder)
            if not dry_run:
                with disk_errors(folder):
                    shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)
        if not dry_run:
            _remove_locks(root / "steps")
    return Collected(doomed, num_blobs, tuple(folders), size_bytes)


def _check_derived(index: Index, ledger: Ledger, described: list[Artifact]) -> None:
    """What is needed follows from these tables: nothing may go by wrong ones."""
    if wrong := disagreements(index, ledger, described, repair=False):
        more = f" ({len(wrong) - 1} more such damages)" if wrong[1:] else ""
        raise RegistryError(
            f"{wrong[0].what} {wrong[0].problem}{more}, so that nobody knows for sure what is needed. Nothing was "
            "removed. Run `bitsmith registry doctor --repair`, then collect again."
        )


@dataclass(frozen=True)
class _AllBut:
    """Holds everything that is not in `doomed`."""

    doomed: set[str]

    def __contains__(self, sha256: object) -> bool:
        return sha256 not in self.doomed


def _blobs_of(artifacts: Iterable[Artifact]) -> set[str]:
    return {entry.sha256 for artifact in artifacts for entry in artifact.files.values()}


def _needed(index: Index, ledger: Ledger, recent: Iterable[Artifact]) -> set[str]:
    roots = {artifact.digest for artifact in recent}
    for version in ledger.versions():
        roots |= {version.digest} | ({version.report_digest} if version.report_digest else set())
    return _with_ancestors(index, roots)


def _with_ancestors(index: Index, digests: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for digest in digests:
        if digest not in found:
            found.update(index.ancestors(digest))
    return found


def _abandoned(root: Path, oldest: float) -> Iterator[Path]:
    """Work of steps and downloads that nobody holds nor touched since; a step stays held while it is yielded."""
    for folder in sorted((root / "steps").glob("*/")):
        with held_if_free(folder.with_name(f"{folder.name}.lock")) as is_free:
            if is_free and _newest(folder) < oldest:
                yield folder
    others = sorted((*(root / "pulls").glob("*"), *root.glob("signing-*/")))
    yield from (path for path in others if _newest(path) < oldest)


def _remove_locks(steps: Path) -> None:
    """What killed processes left of locks on steps that have no work; who waits for one notices that it went."""
    for lock in steps.glob("*.lock"):
        if not lock.with_suffix("").exists():
            with held_if_free(lock):
                pass


def _file_system_seconds(root: Path) -> float:
    """What time the file system says it is, in seconds since 1970."""
    try:
        os.utime(root / "blobs")
    except OSError:  # read-only: nothing is removed then
        return time.time()
    return (root / "blobs").stat().st_mtime


def _newest(path: Path) -> float:
    """When the newest file in or below `path` was changed, in seconds since 1970."""
    newest = 0.0
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        with suppress(FileNotFoundError):  # whoever wrote it has just removed it
            newest = max(newest, os.lstat(each).st_mtime)
    return newest


def _size_bytes(path: Path) -> int:
    inside = path.rglob("*") if path.is_dir() else (path,)
    return sum(each.lstat().st_size for each in inside if not each.is_dir())


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()
