"""Records that cannot be read and that the index knows nothing of: set aside, so that the rest can be taken in.

A lost description is only missing from then on: its file is in records/damaged, for whoever can mend it. A lost version
or move keeps its number, which later ones count on and nobody may get again: a record that says "lost" takes its place,
of a version without an artifact, of a move that moves nothing.
"""

from collections.abc import Collection, Iterator

from registry.alias import AliasMove
from registry.artifact import sha256_of
from registry.errors import InvalidDescriptionError
from registry.finding import REPAIR, Finding
from registry.records import Records
from registry.version import Version

Place = tuple[type[Version] | type[AliasMove], str, int]  # kind, name, number


def lost_descriptions(records: Records, known: Collection[str], *, repair: bool) -> Iterator[tuple[str, Finding]]:
    """Digest and finding of each record of an artifact that cannot be read, but for the `known` ones."""
    for digest in records.digests():
        if digest in known:
            continue
        try:
            records.artifact(digest)
        except InvalidDescriptionError as error:
            problem = f"is damaged ({error.__cause__ or error})"
            if repair:
                problem += f", and is now {records.keep_copy(records.artifact_path(digest))}"
                records.remove_artifact(digest)
            yield digest, Finding(f"the record of artifact {digest[:12]}", problem, repair, f"{REPAIR} Or restore it.")


def lost_facts(records: Records, known: Collection[Place], *, repair: bool) -> Iterator[Finding]:
    """Versions and moves that are not `known`, whose record is damaged, or missing below one that is there."""
    for name in records.names():
        pointed_at = 0
        for kind in (AliasMove, Version):
            numbers = records.numbers(kind, name)
            for number in range(1, max([pointed_at if kind is Version else 0, *numbers]) + 1):
                found, problem = _read(records, kind, name, number)
                if isinstance(found, AliasMove):
                    pointed_at = max(pointed_at, found.to_version or 0)
                if problem is None or (kind, name, number) in known:
                    continue
                if repair:
                    problem += _mark(records, kind, name, number)
                what = f"the record of {'version' if kind is Version else 'move'} {number} of {name}"
                yield Finding(what, problem, repair, f"{REPAIR} Or restore {records.path(kind, name, number)}.")


def is_lost(version: Version) -> bool:
    """Does the version only keep its number, because its record is lost?"""
    return version.digest == _lost_digest(version.name, version.number)


def _read(records: Records, kind: type, name: str, number: int) -> tuple[Version | AliasMove | None, str | None]:
    """The fact, or what is wrong with its record."""
    try:
        found = records.read(kind, name, number)
    except InvalidDescriptionError as error:
        return None, f"is damaged ({error.__cause__ or error})"
    return found, None if found else "is missing"


def _mark(records: Records, kind: type, name: str, number: int) -> str:
    """Let the record say that it is lost; what was done, in words."""
    path = records.path(kind, name, number)
    done = f", and is now {records.keep_copy(path)}" if path.exists() else ""
    note = "what was here is lost"
    if kind is Version:
        records.replace(Version(name, number, _lost_digest(name, number), None, "unknown", note))
        return f"{done}; nobody else gets the number"
    records.replace(AliasMove(name, number, "", "lost", None, None, "unknown", "unknown", note))
    return f"{done}; see in `bitsmith registry alias {name}` whether an alias names the right version"


def _lost_digest(name: str, number: int) -> str:
    return sha256_of({"lost": [name, number]})
