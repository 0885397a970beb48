"""`name:number`, a version that never changes: which artifact it is, when it was made, what measured it."""

import re
from dataclasses import dataclass

from registry.errors import InvalidNameError

LATEST = "latest"  # of all aliases the one that nobody moves: it is the highest number

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Version:
    """One published version.

    Attributes:
        name, number: numbers count from 1 for each name, without a gap.
        digest: of the artifact.
        report_digest: of the evaluation that was published with it, if any.
        created_at: ISO 8601, UTC.
        note: free text.
    """

    name: str
    number: int
    digest: str
    report_digest: str | None
    created_at: str
    note: str

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"


@dataclass(frozen=True)
class VersionReference:
    """What a person types: `name` and `name@latest` (the highest number), `name:3`, or `name@production`."""

    name: str
    number: int | None = None
    alias: str | None = None

    @classmethod
    def parse(cls, text: str) -> "VersionReference":
        """Raises InvalidNameError where the name, the number or the alias is malformed."""
        name, at, alias = text.partition("@")
        if at:
            checked_name(name)
            if not is_name(alias):
                raise InvalidNameError(
                    f"{text!r} has no valid alias: after the @ stands a word such as '{name}@production'. Leave the @ "
                    "out for the latest version."
                )
            return cls(name) if alias == LATEST else cls(name, alias=alias)
        name, colon, number = text.partition(":")
        checked_name(name)
        if not colon:
            return cls(name)
        if not _NUMBER.fullmatch(number):
            raise InvalidNameError(
                f"{text!r} has no valid version: after the colon stands a whole number from 1, "
                f"such as '{name}:1'. Leave the colon out for the latest version."
            )
        return cls(name, int(number))


def is_name(text: str) -> bool:
    """Is it up to 96 of letters, digits, '.', '_', '-', not starting with a sign?"""
    return _NAME.fullmatch(text) is not None


def checked_name(name: str) -> str:
    """`name` if it is a model name (`is_name`), else InvalidNameError."""
    if not is_name(name):
        raise InvalidNameError(
            f"{name!r} is not a model name: it must start with a letter or a digit and go on with at most 95 "
            "letters, digits, '.', '_' or '-'. Choose another name."
        )
    return name
