"""What an examination of a registry found."""

from dataclasses import dataclass

REPAIR = "`bitsmith registry doctor --repair` mends it."


@dataclass(frozen=True)
class Finding:
    """One damage.

    Attributes:
        what: the file, version or database.
        problem: in words.
        is_repaired: now; False where it only was found, or cannot be.
        advice: what to do where it is not.
    """

    what: str
    problem: str
    is_repaired: bool
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.problem}. " + ("Repaired." if self.is_repaired else self.advice)
