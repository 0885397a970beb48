"""Files that are missing or damaged, with the versions that need them."""

from collections.abc import Iterable, Iterator

from registry.artifact import Artifact
from registry.errors import IntegrityError, NotFoundError
from registry.finding import REPAIR, Finding
from registry.progress import Progress
from registry.store import Store
from registry.version import Version


def damaged_blobs(
    store: Store, artifacts: Iterable[Artifact], versions: Iterable[Version], *, repair: bool, progress: Progress
) -> Iterator[Finding]:
    """Read every file. `repair` mends what a remote store or its cache still has, and sets the rest aside.

    What is missing and no version needs is no damage.
    """
    users: dict[str, list[str]] = {}
    for version in versions:
        for digest in filter(None, (version.digest, version.report_digest)):
            users.setdefault(digest, []).append(str(version))
    places: dict[str, list[tuple[Artifact, str]]] = {}
    for artifact in artifacts:
        for path, entry in artifact.files.items():
            places.setdefault(entry.sha256, []).append((artifact, path))
    for sha256, found in progress.track(sorted(places.items()), "Files", len(places)):
        artifact, path = found[0]
        try:
            store.verify(artifact.files[path], path)
            continue
        except NotFoundError:
            problem, was_damaged = "is missing", False
        except IntegrityError as error:
            problem, was_damaged = f"is damaged: expected {error.expected}, found {error.got}", True
        if repair and store.mend(artifact.files[path]):
            yield Finding(f"{path} (blob {sha256[:12]})", problem, True)
            continue
        if repair and was_damaged:
            problem += f" (now {store.set_aside(sha256)})"
        if needed_by := sorted({name for user, _ in found for name in users.get(user.digest, ())}):
            advice = (
                f"It belongs to {', '.join(needed_by)}. Run the command that made it again, or pull it again: the same "
                "bytes heal every version that has them."
            )
            if store.remote is not None and not repair:
                advice = f"If the other copy, in the store or in the cache, is sound, {REPAIR} Else: {advice}"
            yield Finding(f"{path} (blob {sha256[:12]})", problem, False, advice)
        elif was_damaged:
            what = f"{path} of {artifact.kind} {artifact.digest[:12]} (blob {sha256[:12]})"
            yield Finding(what, problem, repair, f"No version needs it: it is made again when a run needs it. {REPAIR}")
