"""What changed between two versions: recipe, choice of each matrix, bits, size, quality."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline.version_facts import VersionFacts


@dataclass(frozen=True)
class VersionDiff:
    """From one version to another.

    Attributes:
        recipe: setting -> (before, after), of those that differ.
        choices: matrix -> (before, after), labels with the rank, of those that differ; None where one lacks it.
        figures: name -> (before, after), all that either has.
        num_shared_files, shared_bytes: that both have, stored once.
    """

    before: VersionFacts
    after: VersionFacts
    recipe: dict[str, tuple[Any, Any]]
    choices: dict[str, tuple[str | None, str | None]]
    figures: dict[str, tuple[float | None, float | None]]
    num_shared_files: int
    shared_bytes: int

    @staticmethod
    def of(before: VersionFacts, after: VersionFacts) -> "VersionDiff":
        """Compare them."""
        choices = _changed(_choices(before), _choices(after))
        mine, theirs = (set(facts.checkpoint.files.values()) for facts in (before, after))
        return VersionDiff(
            before,
            after,
            _changed(before.recipe, after.recipe),
            choices,
            _both(before.figures, after.figures),
            len(mine & theirs),
            sum(entry.size_bytes for entry in mine & theirs),
        )

    @property
    def moves(self) -> list[tuple[str | None, str | None, int]]:
        """(choice before, choice after, matrices), the most frequent first."""
        counted = Counter(self.choices.values())
        return [(*pair, count) for pair, count in sorted(counted.items(), key=lambda item: (-item[1], str(item[0])))]

    def to_json(self) -> dict[str, Any]:
        """Plain values; pairs are [before, after]."""
        return {
            "before": str(self.before.version),
            "after": str(self.after.version),
            "recipe": {name: list(pair) for name, pair in self.recipe.items()},
            "choices": {name: list(pair) for name, pair in self.choices.items()},
            "figures": {name: list(pair) for name, pair in self.figures.items()},
            "shared": {"files": self.num_shared_files, "size_bytes": self.shared_bytes},
        }


def _choices(facts: VersionFacts) -> dict[str, str]:
    return {name: matrix["label"] for name, matrix in (facts.plan["matrices"] | facts.plan["embeddings"]).items()}


def _both(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (before.get(name), after.get(name)) for name in {**before, **after}}


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: pair for name, pair in _both(before, after).items() if pair[0] != pair[1]}
