"""Where a version lies on the Hub, remembered: an artifact of kind "publication" whose parent is the version's.

It is what a pull without the network, and a lock file, go by.
"""

import io

from registry.artifact import Artifact, FileEntry
from registry.publication import MANIFEST
from registry.registry import Registry
from registry.version import Version

KIND = "publication"


def record_publication(
    registry: Registry, digest: str, manifest: bytes, *, repo_id: str, revision: str, commit: str
) -> Artifact:
    """Note that `revision` of the repository named `commit` when it was last asked, and which version is there."""
    metadata = {"repo_id": repo_id, "revision": revision, "commit": commit}
    with registry.adding():
        entry = FileEntry.of_bytes(manifest)
        registry.store.receive(io.BytesIO(manifest), entry, MANIFEST)
        artifact = Artifact.create(KIND, {MANIFEST: entry}, [digest], metadata)
        registry.record(artifact)
    return artifact


def publications(registry: Registry, digest: str) -> list[Artifact]:
    """All known places of the version's artifact on the Hub."""
    return [child for child in registry.children(digest) if child.kind == KIND]


def find_publication(
    registry: Registry, repo_id: str, *, revision: str | None = None, commit: str | None = None
) -> tuple[Version, Artifact] | None:
    """The newest version here that was pushed to or pulled from there, and the record of it."""
    asked = {"repo_id": repo_id} | ({"revision": revision} if revision else {}) | ({"commit": commit} if commit else {})
    for version in sorted(registry.versions(), key=lambda version: (version.created_at, version.number), reverse=True):
        for record in publications(registry, version.digest):
            if all(record.metadata.get(key) == value for key, value in asked.items()):
                return version, record
    return None


def manifest_entry(record: Artifact) -> FileEntry:
    """Hash and size of the manifest that lay there."""
    return record.files[MANIFEST]
