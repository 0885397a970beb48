"""What a repository on the Hub holds of one version, and the manifest that says so.

    <the version's files>      as they are
    report/...                 the files of its report, if it has one
    README.md                  the model card
    bitsmith-manifest.json     descriptions of version, report and all that they were made from; the hash of the card
    model.sig                  a signature over all of these, if there is one (signing.py)

Weights are safetensors and everything else is text or pictures, by a list of allowed names: what a loader could
execute is neither published nor fetched.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from registry.artifact import OWN_KINDS, Artifact, FileEntry, canonical_json
from registry.errors import IntegrityError, InvalidDescriptionError, RegistryError, UnsafeFileError
from registry.registry import Registry
from registry.version import Version

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

MANIFEST_FORMAT = 1
MANIFEST = "bitsmith-manifest.json"
CARD = "README.md"
SIGNATURE = "model.sig"
REPORT_FOLDER = "report"
MOST_MANIFEST_BYTES = 8 << 20

# what a checkpoint and its report hold; a suffix that is not here may be anything, such as a pickle or a program
_WEIGHTS = {".safetensors", ".sig"}
_TEXTS = {".bpe", ".csv", ".html", ".jinja", ".json", ".jsonl", ".md", ".model", ".rst", ".tiktoken", ".toml", ".tsv"}
_TEXTS |= {".txt", ".vocab", ".yaml", ".yml"}
_PICTURES = {".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp"}
_PLAIN_NAMES = ("authors", "citation", "copying", "licence", "license", "notice", "readme", "use_policy", "version")
_NUMBER = re.compile(r"\.v?\d+")  # of LICENSE-2.0, tokenizer.model.v3


@dataclass(frozen=True)
class Content:
    """One file to publish: a blob of the store, or a text made for it."""

    source: Path | bytes
    entry: FileEntry

    @classmethod
    def of_text(cls, text: str) -> "Content":
        return cls(text.encode(), FileEntry.of_bytes(text.encode()))

    def equals(self, remote: "RepoFile | None") -> bool:
        """Does the server's listing say that its file has these bytes?"""
        from huggingface_hub.utils.sha import git_hash

        if remote is None or remote.size != self.entry.size_bytes:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == self.entry.sha256
        return remote.blob_id == git_hash(self.read())

    def read(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class Manifest:
    """bitsmith-manifest.json.

    Attributes:
        artifact: the version's.
        report: of its evaluation, if there is one.
        lineage: all that the two were made from and that was known.
        card: None where the page was left as it was.

    Raises:
        RegistryError: the version has a file that publishing writes itself.
        UnsafePathError: two of the files cannot lie in one folder.
        UnsafeFileError: one could be executed.
        IntegrityError: one of the artifacts is of a kind that only a registry itself makes.
    """

    artifact: Artifact
    report: Artifact | None
    lineage: tuple[Artifact, ...]
    card: FileEntry | None

    def __post_init__(self) -> None:
        for artifact in (self.artifact, *([self.report] if self.report else []), *self.lineage):
            if artifact.kind in OWN_KINDS:
                what = f"a version, a report, or what they were made from, not a {artifact.kind}"
                raise IntegrityError(MANIFEST, what, f"{artifact.kind} {artifact.digest[:12]}")
        Artifact.create("files", self.files)
        refuse_executables(self.files)

    @cached_property
    def files(self) -> dict[str, FileEntry]:
        """path in the repository -> content; without the manifest itself and the signature."""
        reserved = {MANIFEST, SIGNATURE}
        report = {f"{REPORT_FOLDER}/{path}": entry for path, entry in self.report.files.items()} if self.report else {}
        card = {CARD: self.card} if self.card else {}
        if taken := sorted(set(self.artifact.files) & (reserved | set(report) | set(card))):
            raise RegistryError(
                f"The version has a file {taken[0]} of its own, which publishing writes itself; whoever pulls it "
                f"would get one with the wrong hash. {'Leave the card out' if taken[0] == CARD else 'Rename it'}, or "
                "make the version without that file."
            )
        return {**self.artifact.files, **report, **card}

    def to_json(self) -> str:
        """Equal manifests have equal texts."""
        return canonical_json(
            {
                "format": MANIFEST_FORMAT,
                "artifact": _plain(self.artifact),
                "report": _plain(self.report) if self.report else None,
                "lineage": [_plain(each) for each in self.lineage],
                "card": {"sha256": self.card.sha256, "size_bytes": self.card.size_bytes} if self.card else None,
            }
        )

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Read what `to_json` wrote, or a stranger did.

        Raises:
            InvalidDescriptionError: it is something else.
            IntegrityError: a description does not have the digest that it claims, or belongs to another version.
        """
        try:
            found = json.loads(text)
            if found["format"] != MANIFEST_FORMAT:
                raise ValueError(f"format {found['format']!r}")
            artifact = _artifact(found["artifact"])
            report = _artifact(found["report"]) if found["report"] is not None else None
            lineage = tuple(_artifact(each) for each in found["lineage"])
            card = FileEntry(**found["card"]) if found["card"] is not None else None
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            if isinstance(error, RegistryError):
                raise
            raise InvalidDescriptionError(
                f"{MANIFEST} is not in format {MANIFEST_FORMAT} ({type(error).__name__}: {error}). It was changed by "
                "hand, or written by a newer version of bitsmith."
            ) from error
        _check_lineage([artifact, *([report] if report else [])], lineage)
        return cls(artifact, report, lineage, card)


@dataclass(frozen=True)
class Publication:
    """A version as it shall lie in a repository: path -> content, manifest and signature included."""

    manifest: Manifest
    contents: Mapping[str, Content]

    @classmethod
    def of(cls, registry: Registry, version: Version, card: str | None) -> "Publication":
        """Gather it; unsigned.

        Raises:
            NotFoundError: a file of the version is missing.
            RegistryError, UnsafeFileError: see `Manifest`.
        """
        artifact = registry.get(version.digest)
        report = registry.get(version.report_digest) if version.report_digest else None
        texts = {CARD: Content.of_text(card)} if card is not None else {}
        own = [artifact, *([report] if report else [])]
        made_from = {each.digest: each for one in own for each in registry.lineage(one.digest).artifacts}
        lineage = tuple(each for digest, each in made_from.items() if each not in own)
        manifest = Manifest(artifact, report, lineage, texts[CARD].entry if card is not None else None)
        texts[MANIFEST] = Content.of_text(manifest.to_json() + "\n")
        if (size_bytes := texts[MANIFEST].entry.size_bytes) > MOST_MANIFEST_BYTES:  # which nobody could pull
            raise RegistryError(
                f"The manifest of {version} would have {size_bytes} bytes, and {MOST_MANIFEST_BYTES} are the most that "
                "`pull` reads. Nothing was sent. `bitsmith registry export` takes versions of any size."
            )
        contents = {
            path: texts.get(path) or Content(registry.store.path(entry.sha256), entry)
            for path, entry in manifest.files.items()
        }
        return cls(manifest, contents | texts)

    def signed(self, signature: Content) -> "Publication":
        return Publication(self.manifest, {**self.contents, SIGNATURE: signature})

    @property
    def beside(self) -> dict[str, Content]:
        """What is published with the version's own files, without a signature."""
        own = {*self.manifest.artifact.files, SIGNATURE}
        return {path: content for path, content in self.contents.items() if path not in own}


def refuse_executables(paths: Iterable[str]) -> None:
    """Raises UnsafeFileError for the first that git reads, or that by its name a loader might execute."""
    for path in paths:
        if any(part.casefold().startswith(".git") for part in path.split("/")):
            raise UnsafeFileError(
                f"The version has a file {path[:80]!r}: git reads it, and signatures leave it out. Nothing was sent or "
                "fetched. Make the version without that file."
            )
        if not _is_harmless(PurePosixPath(path.casefold())):
            raise UnsafeFileError(
                f"The version has a file {path[:80]!r}: by its name neither safetensors nor text nor a picture, so "
                "that loading it might run code, as a pickle does. Nothing was sent or fetched. Make the version "
                "without that file."
            )


def _is_harmless(path: PurePosixPath) -> bool:
    if _NUMBER.fullmatch(path.suffix):
        return _is_harmless(path.with_suffix(""))
    if not path.suffix:
        return path.name.startswith(_PLAIN_NAMES)
    return path.suffix in _WEIGHTS | _TEXTS | _PICTURES


def _plain(artifact: Artifact) -> dict[str, Any]:
    return json.loads(artifact.to_json())


def _artifact(description: Any) -> Artifact:
    return Artifact.from_json(canonical_json(description))


def _check_lineage(own: list[Artifact], lineage: tuple[Artifact, ...]) -> None:
    """Only what the version was made from: nobody's registry is to remember anything else."""
    known = {artifact.digest: artifact for artifact in lineage}
    reached: set[str] = set()
    todo = [parent for artifact in own for parent in artifact.parents]
    while todo:
        digest = todo.pop()
        if digest not in reached:
            reached.add(digest)
            todo += known[digest].parents if digest in known else ()
    if stray := sorted(set(known) - reached):
        raise IntegrityError(MANIFEST, "the lineage of the version", f"an artifact {stray[0][:12]} outside of it")
