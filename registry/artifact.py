"""What a step of the pipeline made: some files, where they came from, and what is known of them.

An artifact is named by the sha256 of its own description. Neither time nor host is part of it, so that
equal work has an equal name, on any machine.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from registry.errors import IntegrityError, InvalidDescriptionError, InvalidNameError, UnsafePathError
from registry.paths import check_distinct, checked_path

ARTIFACT_FORMAT = 1
# what a registry says of an artifact by itself; from elsewhere it would be hearsay
OWN_KINDS = frozenset({"signature", "publication"})

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """The content of one file: `sha256` in lower-case hex, and `size_bytes`."""

    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        checked_digest(self.sha256)
        if isinstance(self.size_bytes, bool) or not isinstance(self.size_bytes, int) or self.size_bytes < 0:
            raise InvalidDescriptionError(f"A file's size is a number of bytes, not {self.size_bytes!r}.")

    @classmethod
    def of_bytes(cls, content: bytes) -> "FileEntry":
        return cls(hashlib.sha256(content).hexdigest(), len(content))


@dataclass(frozen=True)
class Artifact:
    """One immutable result. Make it with `Artifact.create`; two are equal if their digests are.

    Attributes:
        digest: sha256 of the canonical JSON of the rest.
        kind: "statistics", "costs", "plan", "matrices", "checkpoint", "evaluation" or any other word.
        files: relative posix path -> content.
        parents: digests of the artifacts that this one was made from, in the maker's order.
        metadata: plain JSON values that decide or describe the result; never a time or a host.
    """

    digest: str
    kind: str = field(compare=False)
    files: Mapping[str, FileEntry] = field(compare=False)
    parents: tuple[str, ...] = field(compare=False)
    metadata: Mapping[str, Any] = field(compare=False)

    @classmethod
    def create(
        cls,
        kind: str,
        files: Mapping[str, FileEntry],
        parents: Iterable[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> "Artifact":
        """Check the parts and name them.

        Raises:
            UnsafePathError: a path leaves its folder, or two are one on some system.
            InvalidNameError: a parent is no digest, or `kind` is empty.
            TypeError: `metadata` holds something that JSON has no exact form for.
        """
        if not kind or not isinstance(kind, str):
            raise InvalidNameError(f"An artifact's kind must be a word such as 'plan', not {kind!r}.")
        entries = {checked_path(path): files[path] for path in sorted(files)}
        check_distinct(entries)
        lineage = tuple(checked_digest(parent) for parent in parents)
        facts = json.loads(canonical_json(dict(metadata or {})))
        digest = sha256_of(_description(kind, entries, lineage, facts))
        return cls(digest, kind, MappingProxyType(entries), lineage, MappingProxyType(facts))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Artifact":
        """Read what `to_json` wrote, and check that its name is still the right one.

        Raises:
            IntegrityError: the description does not have the digest that it claims.
            InvalidDescriptionError: `text` is not an artifact's description.
        """
        try:
            found = json.loads(text)
            claimed = found.pop("digest")
            if found.pop("format") != ARTIFACT_FORMAT:
                raise ValueError("unknown format")
            files = {path: FileEntry(**entry) for path, entry in found.pop("files").items()}
            artifact = cls.create(files=files, **found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, UnsafePathError):
                raise
            raise InvalidDescriptionError(
                f"This is not the description of an artifact in format {ARTIFACT_FORMAT} "
                f"({type(error).__name__}: {error}). It was changed by hand, or written by a newer version."
            ) from error
        if artifact.digest != claimed:
            raise IntegrityError(
                f"The description of {artifact.kind} {str(claimed)[:12]}", str(claimed), artifact.digest
            )
        return artifact

    def to_json(self) -> str:
        """The canonical description, with the digest."""
        rest = _description(self.kind, self.files, self.parents, self.metadata)
        return canonical_json(rest | {"digest": self.digest})

    def __reduce__(self):
        return Artifact.from_json, (self.to_json(),)  # so that it can be sent to another process

    @property
    def size_bytes(self) -> int:
        """Bytes of all files; equal files count each time."""
        return sum(entry.size_bytes for entry in self.files.values())


def _description(
    kind: str, files: Mapping[str, FileEntry], parents: tuple[str, ...], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "format": ARTIFACT_FORMAT,
        "kind": kind,
        "files": {path: {"sha256": e.sha256, "size_bytes": e.size_bytes} for path, e in files.items()},
        "parents": list(parents),
        "metadata": dict(metadata),
    }


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: sorted keys, no spaces, UTF-8, tuples as lists.

    Raises:
        TypeError: a value that JSON cannot give back as it was: a key that is no string, NaN, infinity,
            bytes, a set, any object.
    """
    _check_json(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: Any) -> str:
    """sha256 of `canonical_json(value)`, in hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _check_json(value: Any, where: str) -> None:
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value}, which JSON cannot hold. Write it as a string or as None.")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; JSON keys are strings. Convert it first.")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; use plain numbers, strings, lists and dicts.")


def is_digest(text: object) -> bool:
    """Is it 64 lower-case hex digits?"""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def checked_digest(digest: str) -> str:
    """`digest` if it is 64 lower-case hex digits, else InvalidNameError."""
    if not is_digest(digest):
        raise InvalidNameError(f"{str(digest)[:80]!r} is not a sha256 digest: 64 lower-case hex digits.")
    return digest
