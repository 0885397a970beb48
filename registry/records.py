"""The facts that the index could lose, each in a small file beside the blobs; from them `doctor` makes the index anew.

    records/artifacts/ab/abcdef...json      what an artifact is, named by its digest
    records/versions/<name>/000003.json     a version
    records/moves/<name>/000012.json        a move of an alias

Files are written once, whole, while the database's transaction holds the name and before it is committed. So a kill
leaves at most the next file of a name that the index does not know yet, and who comes next takes it in.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from registry.alias import AliasMove
from registry.artifact import Artifact, canonical_json, checked_digest
from registry.errors import IntegrityError, InvalidDescriptionError
from registry.store import disk_errors, write_atomically
from registry.version import Version, checked_name

T = TypeVar("T", Version, AliasMove)
_FOLDERS = {Version: "versions", AliasMove: "moves"}


class Records:
    """The files below `root`/records. Every method raises RegistryError where the disk refuses."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "records"

    def add_artifact(self, artifact: Artifact) -> None:
        """Write the description, unless it is there."""
        path = self._artifact_path(artifact.digest)
        if not path.exists():
            self._write(path, artifact.to_json())

    def artifact(self, digest: str) -> Artifact | None:
        """The artifact of that digest; None where there is no file.

        Raises:
            InvalidDescriptionError, IntegrityError: the file is damaged.
        """
        path = self._artifact_path(digest)
        with disk_errors(path):
            return Artifact.from_json(path.read_bytes()) if path.exists() else None

    def digests(self) -> Iterator[str]:
        """Of all artifacts with a file, sound or not."""
        with disk_errors(self.folder):
            yield from (path.stem for path in sorted((self.folder / "artifacts").glob("??/*.json")))

    def remove_artifact(self, digest: str) -> None:
        """Remove the description, if it is there."""
        path = self._artifact_path(digest)
        with disk_errors(path):
            path.unlink(missing_ok=True)

    def add(self, fact: Version | AliasMove) -> None:
        """Write the next version or move of a name.

        Raises:
            IntegrityError: another one has that number already.
        """
        kind: type = type(fact)
        found = self.read(kind, fact.name, fact.number)
        if found is None:
            self.replace(fact)
        elif found != fact:
            raise IntegrityError(str(self._path(kind, fact.name, fact.number)), str(fact), str(found))

    def read(self, kind: type[T], name: str, number: int) -> T | None:
        """The version or move of that number; None where there is no file.

        Raises:
            InvalidDescriptionError: the file is damaged.
        """
        path = self._path(kind, name, number)
        with disk_errors(path):
            if not path.exists():
                return None
            content = path.read_bytes()
        try:
            found = kind(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise InvalidDescriptionError(
                f"{path} is damaged ({error}). `bitsmith registry doctor --repair` writes it again if it can."
            ) from error
        if (found.name, found.number) != (name, number):
            raise InvalidDescriptionError(f"{path} describes another: {found.name}, number {found.number}.")
        return found

    def replace(self, fact: Version | AliasMove) -> None:
        """Write a version or move whatever is there."""
        self._write(self._path(type(fact), fact.name, fact.number), canonical_json(asdict(fact)))

    def has(self, kind: type[Version] | type[AliasMove], name: str, number: int) -> bool:
        """Is there a file for the version or move of that number?"""
        return self._path(kind, name, number).exists()

    def names(self) -> list[str]:
        """All names that have a version or a move."""
        with disk_errors(self.folder):
            found = {path.name for kind in _FOLDERS.values() for path in (self.folder / kind).glob("*/")}
        return sorted(found)

    def has_versions(self) -> bool:
        """Was anything ever published here?"""
        with disk_errors(self.folder):
            return next((self.folder / _FOLDERS[Version]).glob("*/*.json"), None) is not None

    def _write(self, path: Path, text: str) -> None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text + "\n")

    def _artifact_path(self, digest: str) -> Path:
        return self.folder / "artifacts" / checked_digest(digest)[:2] / f"{digest}.json"

    def _path(self, kind: type, name: str, number: int) -> Path:
        return self.folder / _FOLDERS[kind] / checked_name(name) / f"{number:06d}.json"
