"""Open the index of a registry, with the records that it could be made from again."""

import shutil
import tempfile
import weakref
from pathlib import Path

from sqlalchemy import URL

from registry.database import Database, sqlite_path, sqlite_url
from registry.errors import IndexLostError
from registry.index import Index
from registry.ledger import Ledger
from registry.read_only import copy_at_rest, is_writable
from registry.records import Records
from registry.settings import RegistrySettings
from registry.store import write_atomically


def open_index(root: Path, *, read_only: bool = False) -> Index:
    """The index of the registry in `root`; made if nothing was ever published there.

    Args:
        read_only: through a copy, as where `root` may not be written.
    Raises:
        IndexLostError: the database is missing, and the records tell of versions.
        RegistryError: see `Database`.
    """
    records = Records(root)
    if _under_way(root).exists():
        raise IndexLostError(
            "The registry's index is being made anew, or that was interrupted. Wait for it, or run "
            "`bitsmith registry doctor --repair`."
        )
    if read_only or not is_writable(root):
        return _open_to_read(root, records)
    index = Index(Database(database_url(root), may_be_made=not records.has_versions()), records)
    _complete(index, records.folder / "complete")
    return index


def _open_to_read(root: Path, records: Records) -> Index:
    url, may_be_made = database_url(root), not records.has_versions()
    path = sqlite_path(url)
    if path is None:
        return Index(Database(url, may_be_made=may_be_made), records)
    folder = Path(tempfile.mkdtemp(prefix="bitsmith-index-"))
    try:
        copy_at_rest(path, folder)
        index = Index(Database(sqlite_url(folder / path.name), may_be_made=may_be_made), records)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(index, shutil.rmtree, folder, ignore_errors=True)
    return index


def rebuilt_index(root: Path) -> Index:
    """Make the tables anew, in an empty database, from the records. A killed call is repeated."""
    records = Records(root)
    write_atomically(_under_way(root), "")
    index = Index(Database(database_url(root)), records)
    index.take_in_records()
    Ledger(index).take_in_records()
    _under_way(root).unlink(missing_ok=True)
    return index


def is_interrupted(root: Path) -> bool:
    """Was `rebuilt_index` not brought to its end?"""
    return _under_way(root).exists()


def _complete(index: Index, marker: Path) -> None:
    """Write the records of a registry that is older than they are, once."""
    if marker.exists():
        return
    for artifact, _ in index.artifacts():
        index.records.add_artifact(artifact)
    index.note_made()
    for fact in Ledger(index).facts():
        index.records.add(fact)
    write_atomically(marker, "")


def database_url(root: Path) -> str | URL:
    """What registry.toml says, or the SQLite file in `root`."""
    return RegistrySettings.read(root).database or sqlite_url(root / "index.sqlite")


def _under_way(root: Path) -> Path:
    return root / "records" / "under-way"
