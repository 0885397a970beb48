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
    """Note that `revision` of the repository named `commit` when it was last asked, and which version is there.

    Look-ups of one repository are counted, for the last answer is the one that holds; the same answer again is not
    noted again.
    """
    with registry.adding():
        entry = FileEntry.of_bytes(manifest)
        registry.store.receive(io.BytesIO(manifest), entry, MANIFEST)

        def found_by(look_up: int) -> Artifact:
            metadata = {"repo_id": repo_id, "revision": revision, "commit": commit, "look_up": look_up}
            return Artifact.create(KIND, {MANIFEST: entry}, [digest], metadata)

        last = max(_of_repository(registry, repo_id), key=_look_up, default=None)
        if last is None or last != found_by(_look_up(last)):
            last = found_by(_look_up(last) + 1 if last else 1)
        registry.record(last)
    return last


def publications(registry: Registry, digest: str) -> list[Artifact]:
    """All known places of the version's artifact on the Hub."""
    return [child for child in registry.children(digest) if child.kind == KIND]


def find_publication(
    registry: Registry, repo_id: str, *, revision: str | None = None, commit: str | None = None
) -> tuple[Version, Artifact] | None:
    """What the last look-up there found, of those that are a version here, and the record of it."""
    asked = ({"revision": revision} if revision else {}) | ({"commit": commit} if commit else {})
    versions: dict[str, list[Version]] = {}
    for version in registry.versions():
        versions.setdefault(version.digest, []).append(version)
    found = [
        (version, record)
        for record in _of_repository(registry, repo_id)
        if all(record.metadata.get(key) == value for key, value in asked.items())
        for version in versions.get(record.parents[0], ())
    ]
    return max(found, key=lambda pair: (_look_up(pair[1]), pair[0].created_at, pair[0].number), default=None)


def repositories_of(registry: Registry, name: str) -> set[str]:
    """Where versions of that name were pushed to or pulled from."""
    digests = {version.digest for version in registry.versions() if version.name == name}
    records = (record for record in registry.of_kind(KIND) if record.parents[0] in digests)
    return {str(record.metadata.get("repo_id")) for record in records}


def manifest_entry(record: Artifact) -> FileEntry:
    """Hash and size of the manifest that lay there."""
    return record.files[MANIFEST]


def _of_repository(registry: Registry, repo_id: str) -> list[Artifact]:
    return [record for record in registry.of_kind(KIND) if record.metadata.get("repo_id") == repo_id]


def _look_up(record: Artifact) -> int:
    """Its number; 0 in a record from before they were counted."""
    return record.metadata.get("look_up", 0)
