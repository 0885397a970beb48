"""The page that Prefect shows beside a finished run: what was planned, what came out, how long it took."""

import re
from typing import TYPE_CHECKING

from pipeline.budget import human_bytes
from pipeline.stage_table import stage_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.compress import Compressed
    from registry import Registry, Version

MANY = 1e5  # from here on whole numbers, written out: bytes


def summary(done: "Compressed") -> str:
    """Markdown."""
    plan, evaluation = done.plan, done.evaluation
    result = [
        ("bits per parameter", f"{plan.bits_per_param:.4f} (budget {plan.budget})"),
        ("size", f"{human_bytes(done.original_bytes)} -> {human_bytes(done.size_bytes)}"),
        *([("embeddings", plan.embeddings_label)] if plan.embeddings else []),
        ("allocation", f"{plan.status}, gap {plan.gap:.1e}, {plan.solver}"),
        *([("recovery", done.recovery.meaning)] if done.recovery else []),
        ("folder", f"`{done.folder}`"),
        ("digest", f"`{done.version.digest}`"),
    ]
    parts = [f"# {done.version}", _table(("", ""), result)]
    if evaluation is not None:
        parts += ["## Quality", _table(("", "original", "compressed"), evaluation.rows())]
    parts += ["## Stages", _table(*stage_table(done.stages))]
    parts += ["## Plan", _table(("choice", "matrices"), _choices(done))]
    return "\n\n".join(parts) + "\n"


def artifact_key(name: str) -> str:
    """A version's name in the characters that Prefect allows: one page a name, with its history."""
    return "bitsmith-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def show_beside_last(registry: "Registry", reference: str) -> None:
    """A table of a version's figures beside those of the last that was published, or of the one before it."""
    from prefect.artifacts import create_table_artifact

    from pipeline.version_facts import FIGURES, VersionFacts

    version = registry.version(reference)
    figures = {str(each): VersionFacts.of(registry, each).figures for each in (*_last(registry, version), version)}
    rows = [
        {"figure": FIGURES[key]} | {name: _figure(found.get(key)) for name, found in figures.items()}
        for key in figures[str(version)]
    ]
    what = " and ".join(reversed(figures))
    create_table_artifact(rows, key=f"{artifact_key(version.name)}-figures", description=what)


def _last(registry: "Registry", version: "Version") -> "list[Version]":
    """A version that a gate refused is nothing to compare with where others went out."""
    from registry.publication_record import publications

    earlier = [each for each in registry.versions() if each.name == version.name and each.number < version.number]
    earlier.sort(key=lambda each: each.number)
    return ([each for each in earlier if publications(registry, each.digest)] or earlier)[-1:]


def _figure(value: float | None) -> str:
    """Not a hyphen where there is none: alone in a cell, Prefect's pages take it for a list."""
    if value is None:
        return "none"
    return f"{value:,.0f}" if value >= MANY else f"{value:.6g}"


def _choices(done: "Compressed") -> list[tuple[str, str]]:
    labels = [matrix.label for matrix in done.plan.matrices.values()]
    return [(label, str(labels.count(label))) for label in sorted(set(labels))]


def _table(headers: tuple[str, ...], rows: "Iterable[tuple[str, ...]]") -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
