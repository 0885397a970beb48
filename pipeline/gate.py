"""Gates: what a version must reach before an alias may name it, such as `kld<=0.05` or `size_bytes<=200e6`."""

import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.errors import GateError
from pipeline.version_facts import FIGURES

_COMPARE = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_REQUIREMENT = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=|<|>)\s*(\S+)\s*")


@dataclass(frozen=True)
class Requirement:
    """`figure sign bound`; `figure` is one of FIGURES."""

    figure: str
    sign: str
    bound: float

    @staticmethod
    def parse(text: str) -> "Requirement":
        """Raises GateError where `text` is no requirement."""
        found = _REQUIREMENT.fullmatch(text)
        try:
            bound = float(found[3]) if found else math.nan
        except ValueError:
            bound = math.nan
        if found is None or found[1] not in FIGURES or not math.isfinite(bound):
            raise GateError(
                f"{text!r} is not a requirement. Expected a figure, <=, >=, < or >, and a number, such as 'kld<=0.05'. "
                f"The figures are {', '.join(FIGURES)}."
            )
        return Requirement(found[1], found[2], bound)

    def __str__(self) -> str:
        return f"{self.figure}{self.sign}{self.bound:.15g}"

    def is_met(self, value: float | None) -> bool:
        """A figure that is not known, or is NaN, meets nothing."""
        return value is not None and bool(_COMPARE[self.sign](value, self.bound))


def check(what: str, figures: Mapping[str, float], requirements: Iterable[Requirement]) -> None:
    """Let `what` pass, or raise GateError with every figure that was asked for."""
    asked = list(requirements)
    if all(requirement.is_met(figures.get(requirement.figure)) for requirement in asked):
        return
    found = "; ".join(_judged(requirement, figures.get(requirement.figure)) for requirement in asked)
    raise GateError(
        f"{what} does not meet what is required: {found}. It was not moved or published now. Choose another version, "
        "or ask for less."
    )


def _judged(requirement: Requirement, value: float | None) -> str:
    known = "was not measured" if value is None else f"is {value:{'.0f' if value.is_integer() else '.9g'}}"
    verdict = "met" if requirement.is_met(value) else "not met"
    return f"{requirement.figure} {known}, wanted {requirement.sign}{requirement.bound:.15g} ({verdict})"
