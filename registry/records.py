"""The facts that the index could lose, each in a small file beside the blobs; from them `doctor` makes the index anew.

    records/artifacts/ab/abcdef...json      what an artifact is, named by its digest
    records/made/ab/abcdef...               that a step here made it
    records/versions/<name>/000003.json     a version
    records/moves/<name>/000012.json        a move of an alias
    records/damaged/<random>-<file>         what `doctor` could not read, nor write again

Files are written once, whole, while the database's transaction holds the name and before it is committed. So a kill
leaves at most the next file of a name that the index does not know yet, and who comes next takes it in.
"""

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from registry.alias import AliasMove
from registry.artifact import Artifact, canonical_json, checked_digest, is_digest
from registry.errors import IntegrityError, InvalidDescriptionError, UnsafePathError
from registry.store import copy_hashed, disk_errors, write_atomically
from registry.version import Version, checked_name, is_name

T = TypeVar("T", Version, AliasMove)
_NUMBER = re.compile(r"[0-9]{6,9}")
_ADVICE = "`bitsmith registry doctor --repair` writes it again, or sets it aside where nothing else tells what it told."
_FOLDERS = {Version: "versions", AliasMove: "moves"}


class Records:
    """The files below `root`/records. Every method raises RegistryError where the disk refuses."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "records"

    def add_artifact(self, artifact: Artifact) -> None:
        """Write the description, unless it is there."""
        path = self.artifact_path(artifact.digest)
        if not path.exists():
            self._write(path, artifact.to_json())

    def artifact(self, digest: str) -> Artifact | None:
        """The artifact of that digest; None where there is no file.

        Raises:
            InvalidDescriptionError: the file is damaged.
        """
        path = self.artifact_path(digest)
        with disk_errors(path):
            if not path.exists():
                return None
            content = path.read_bytes()
        try:
            found = Artifact.from_json(content)
        except (InvalidDescriptionError, IntegrityError, UnsafePathError) as error:
            raise InvalidDescriptionError(f"{path} is damaged ({error}). {_ADVICE}") from error
        if found.digest != digest:
            raise InvalidDescriptionError(f"{path} describes another: {found.digest}. {_ADVICE}")
        return found

    def digests(self) -> Iterator[str]:
        """Of all artifacts with a file, sound or not."""
        with disk_errors(self.folder):
            found = sorted(path.stem for path in (self.folder / "artifacts").glob("??/*.json"))
        yield from (stem for stem in found if is_digest(stem))

    def remove_artifact(self, digest: str) -> None:
        """Remove the description, if it is there."""
        for path in (self.artifact_path(digest), self._made_path(digest)):
            with disk_errors(path):
                path.unlink(missing_ok=True)

    def note_made(self, digest: str) -> None:
        """Note that a step here made the artifact: what came from elsewhere may claim any settings."""
        if not self.was_made(digest):
            self._write(self._made_path(digest), "")

    def was_made(self, digest: str) -> bool:
        """Did a step here make the artifact?"""
        return self._made_path(digest).exists()

    def _made_path(self, digest: str) -> Path:
        return self.folder / "made" / checked_digest(digest)[:2] / digest

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
            raise IntegrityError(str(self.path(kind, fact.name, fact.number)), str(fact), str(found))

    def read(self, kind: type[T], name: str, number: int) -> T | None:
        """The version or move of that number; None where there is no file.

        Raises:
            InvalidDescriptionError: the file is damaged.
        """
        path = self.path(kind, name, number)
        with disk_errors(path):
            if not path.exists():
                return None
            content = path.read_bytes()
        try:
            found = kind(**json.loads(content))
            if isinstance(found, Version):
                checked_digest(found.digest)
                checked_digest(found.report_digest or found.digest)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidDescriptionError(f"{path} is damaged ({error}). {_ADVICE}") from error
        if (found.name, found.number) != (name, number):
            raise InvalidDescriptionError(f"{path} describes another: {found.name}, number {found.number}. {_ADVICE}")
        return found

    def replace(self, fact: Version | AliasMove) -> None:
        """Write a version or move whatever is there."""
        self._write(self.path(type(fact), fact.name, fact.number), canonical_json(asdict(fact)))

    def has(self, kind: type[Version] | type[AliasMove], name: str, number: int) -> bool:
        """Is there a file for the version or move of that number?"""
        return self.path(kind, name, number).exists()

    def names(self) -> list[str]:
        """All names that have a version or a move."""
        with disk_errors(self.folder):
            found = {path.name for kind in _FOLDERS.values() for path in (self.folder / kind).glob("*/")}
        return sorted(filter(is_name, found))

    def numbers(self, kind: type[Version] | type[AliasMove], name: str) -> list[int]:
        """Of the versions or moves of that name with a file, sound or not."""
        with disk_errors(self.folder):
            found = [path.stem for path in (self.folder / _FOLDERS[kind] / checked_name(name)).glob("*.json")]
        return sorted(int(stem) for stem in found if _NUMBER.fullmatch(stem))

    def has_versions(self) -> bool:
        """Was anything ever published here?"""
        with disk_errors(self.folder):
            return next((self.folder / _FOLDERS[Version]).glob("*/*.json"), None) is not None

    def keep_copy(self, path: Path) -> Path:
        """Copy a damaged file into records/damaged, before it is removed or written again."""
        name = "-".join((secrets.token_hex(4), *path.relative_to(self.folder).parts))
        target = self.folder / "damaged" / name
        with disk_errors(path):
            target.parent.mkdir(exist_ok=True)
            copy_hashed(path, target)
        return target

    def artifact_path(self, digest: str) -> Path:
        """Where the description of that artifact is, or would be."""
        return self.folder / "artifacts" / checked_digest(digest)[:2] / f"{digest}.json"

    def path(self, kind: type, name: str, number: int) -> Path:
        """Where the version or move of that number is, or would be."""
        return self.folder / _FOLDERS[kind] / checked_name(name) / f"{number:06d}.json"

    def _write(self, path: Path, text: str) -> None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text + "\n")
