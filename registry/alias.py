"""`name@alias`: a word that names one version now and another later, and the log of how it moved."""

import getpass
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from registry.errors import InvalidNameError
from registry.version import LATEST, is_name


@dataclass(frozen=True)
class AliasMove:
    """One row of the log, which is only ever added to.

    Attributes:
        number: counts the moves of all aliases of a name, from 1.
        action: SET, PROMOTE, ROLLBACK or REMOVE.
        from_version, to_version: None where the alias named nothing.
        moved_at: ISO 8601, UTC.
        moved_by: user@host, or what BITSMITH_ACTOR says.
    """

    SET: ClassVar[str] = "set"
    PROMOTE: ClassVar[str] = "promote"
    ROLLBACK: ClassVar[str] = "rollback"
    REMOVE: ClassVar[str] = "remove"

    name: str
    number: int
    alias: str
    action: str
    from_version: int | None
    to_version: int | None
    moved_at: str
    moved_by: str
    reason: str

    @staticmethod
    def before(moves: Iterable["AliasMove"]) -> int | None:
        """The version to go back to from the end of an alias's log; None if there is none.

        A rollback undoes a move, so that the next one goes further back; nothing goes back over a removal.
        """
        standing: list[int] = []
        for move in moves:
            if move.action == AliasMove.ROLLBACK:
                standing.pop()
            elif move.to_version is None:
                standing.clear()
            elif not standing or standing[-1] != move.to_version:
                standing.append(move.to_version)
        return standing[-2] if len(standing) > 1 else None


def checked_alias(alias: str) -> str:
    """`alias` if it is a word that may be moved by hand, else InvalidNameError."""
    if alias == LATEST:
        raise InvalidNameError(
            f"{LATEST!r} always names the version with the highest number and cannot be moved. Choose another alias, "
            "such as 'production'."
        )
    if not is_name(alias):
        raise InvalidNameError(
            f"{alias!r} is not an alias: it must start with a letter or a digit and go on with at most 95 letters, "
            "digits, '.', '_' or '-'."
        )
    return alias


def actor() -> str:
    """Who acts, for the log: BITSMITH_ACTOR, or user@host."""
    if named := os.environ.get("BITSMITH_ACTOR"):
        return named
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may run as a number without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
