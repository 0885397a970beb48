"""What the registry has of a version: recipe, plan, report, what it was made from, and the figures that people compare.

A pulled version has no report here, and so no quality.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.eval_report import EvalReport

if TYPE_CHECKING:
    from registry import Artifact, Registry, Version

FIGURES = {
    "kld": "KL divergence from the original, nats/token",
    "kld_p99": "its 99th percentile",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity over the original's",
    "top1": "top-1 agreement with the original, %",
    "bits_per_param": "bits per parameter of the compressed matrices",
    "size_bytes": "bytes of all files",
}
SIZES = ("bits_per_param", "size_bytes")  # known of every version; the others are measured by its evaluation


@dataclass(frozen=True)
class VersionFacts:
    """One version of a compressed model.

    Attributes:
        version: None where the files were read elsewhere than in a registry.
        plan, recipe: plan.json and recipe.json of the checkpoint.
        report: report.json, or None where there is none here.
        report_files: names of the report's files.
        lineage: the checkpoint and what it was made from, as far as it is described here, nearest first.
    """

    version: "Version | None"
    checkpoint: "Artifact"
    plan: dict[str, Any]
    recipe: dict[str, Any]
    report: dict[str, Any] | None
    report_files: frozenset[str]
    lineage: tuple["Artifact", ...]

    @staticmethod
    def of(registry: "Registry", version: "Version") -> "VersionFacts":
        """Read them. Raises RegistryError where the version's files are not all there."""
        checkpoint = registry.get(version.digest)
        report = registry.get(version.report_digest) if version.report_digest else None
        plan, recipe = (_read(registry.path(checkpoint, name)) for name in ("plan.json", "recipe.json"))
        return VersionFacts(
            version,
            checkpoint,
            plan,
            recipe,
            report=_read(registry.path(report, "report.json")) if report else None,
            report_files=frozenset(report.files) if report else frozenset(),
            lineage=registry.lineage(version.digest).artifacts,
        )

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The report's part on quality; None where it was not measured."""
        return self.report["evaluation"] if self.report else None

    @property
    def statistics(self) -> "Artifact | None":
        """The calibration's result; None where there was none, or its description is not here."""
        return next((artifact for artifact in self.lineage if artifact.kind == "statistics"), None)

    @property
    def tools(self) -> dict[str, list[str]]:
        """Tool -> the versions that worked on it, the last first: a step that was found keeps what made it."""
        found: dict[str, dict[str, None]] = {}
        for artifact in self.lineage:
            for tool, number in artifact.metadata.get("tools", {}).items():
                found.setdefault(tool, {})[number] = None
        return {tool: list(numbers) for tool, numbers in found.items()}

    @cached_property
    def figures(self) -> dict[str, float]:
        """By the names of `FIGURES`; those of quality only where it was measured."""
        found = {"bits_per_param": float(self.plan["bits_per_param"]), "size_bytes": float(self.checkpoint.size_bytes)}
        if self.evaluation:
            quality = EvalReport.from_json(self.evaluation["report"])
            found |= {
                "kld": quality.kl_divergence.mean,
                "kld_p99": quality.kl_p99,
                "perplexity": quality.perplexity.mean,
                "perplexity_ratio": quality.perplexity.mean / quality.base_perplexity.mean,
                "top1": quality.top1_agreement.to_percent().mean,
            }
        return {name: found[name] for name in FIGURES if name in found}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
