"""What the index says twice: tables that follow from others, and must agree with them.

    aliases            the last move of each alias in alias_moves
    artifact_parents   the parents in each artifact's description
    step_results       each key is that of the step which the artifact's description tells of

A step that is missing is no damage: it may have been forgotten on purpose, and is made again.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator

from sqlalchemy import Connection, delete, select

from registry.artifact import Artifact
from registry.finding import REPAIR, Finding
from registry.index import Index, step_key_of
from registry.ledger import Ledger
from registry.schema import alias_moves, aliases, artifact_parents, artifacts, step_results


def disagreements(index: Index, ledger: Ledger, described: Collection[Artifact], *, repair: bool) -> list[Finding]:
    """Where the tables disagree; `repair` writes the derived ones again.

    Args:
        described: the artifacts whose description can be read.
    """
    known = {artifact.digest: artifact for artifact in described}
    with index.database.snapshot() as connection:
        wrong_aliases = list(_wrong_aliases(connection))
        rows = set(connection.scalars(select(artifacts.c.digest)))
        wrong_parents = list(_wrong_parents(connection, known, rows))
        wrong_steps = list(_wrong_steps(connection, known, rows))
    if repair:
        for name, alias in wrong_aliases:
            ledger.write_alias_again(name, alias)
        with index.database.writing() as connection:
            for digest in wrong_parents:
                connection.execute(delete(artifact_parents).where(artifact_parents.c.digest == digest))
                if digest in known:
                    index.insert_artifact(connection, known[digest])
            for key in wrong_steps:
                connection.execute(delete(step_results).where(step_results.c.key == key))
        index.note_results(known.values(), set(wrong_steps))
    found = [(f"{name}@{alias}", "is not what the log of its moves says") for name, alias in wrong_aliases]
    found += [
        (f"the parents of artifact {digest[:12]}", "are not those of its description") for digest in wrong_parents
    ]
    found += [(f"the result of step {key[:12]}", "is an artifact of another step") for key in wrong_steps]
    return [Finding(f"the index: {what}", problem, repair, REPAIR) for what, problem in found]


def _wrong_aliases(connection: Connection) -> Iterator[tuple[str, str]]:
    """name, alias"""
    moves = select(alias_moves.c.name, alias_moves.c.alias, alias_moves.c.to_version).order_by(alias_moves.c.number)
    last = {(row.name, row.alias): row.to_version for row in connection.execute(moves)}
    here = {(row.name, row.alias): row.version for row in connection.execute(select(aliases))}
    yield from (place for place in sorted(last.keys() | here.keys()) if last.get(place) != here.get(place))


def _wrong_parents(connection: Connection, known: dict[str, Artifact], rows: set[str]) -> Iterator[str]:
    """Digests of children; a row that cannot be read, or is lost, tells of none."""
    here: dict[str, list[str]] = defaultdict(list)
    query = select(artifact_parents).order_by(artifact_parents.c.digest, artifact_parents.c.position)
    for row in connection.execute(query):
        here[row.digest].append(row.parent)
    for digest in sorted(known.keys() | here.keys()):
        if digest in known and digest in rows:
            if tuple(here[digest]) != known[digest].parents:
                yield digest
        elif digest not in rows and here[digest]:
            yield digest


def _wrong_steps(connection: Connection, known: dict[str, Artifact], rows: set[str]) -> Iterator[str]:
    """Keys."""
    for row in connection.execute(select(step_results).order_by(step_results.c.key)):
        if row.digest not in rows or (row.digest in known and step_key_of(known[row.digest]) != row.key):
            yield row.key
