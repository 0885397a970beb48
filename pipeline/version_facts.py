"""What the registry has of a version, read from its files: recipe, plan, report, and the figures that people compare.

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


@dataclass(frozen=True)
class VersionFacts:
    """One version of a compressed model.

    Attributes:
        plan, recipe: plan.json and recipe.json of the checkpoint.
        report: report.json, or None where there is none here.
    """

    version: "Version"
    checkpoint: "Artifact"
    plan: dict[str, Any]
    recipe: dict[str, Any]
    report: dict[str, Any] | None

    @staticmethod
    def of(registry: "Registry", version: "Version") -> "VersionFacts":
        """Read them. Raises RegistryError where the version's files are not all there."""
        checkpoint = registry.get(version.digest)
        report = None
        if version.report_digest:
            report = _read(registry.path(registry.get(version.report_digest), "report.json"))
        plan, recipe = (_read(registry.path(checkpoint, name)) for name in ("plan.json", "recipe.json"))
        return VersionFacts(version, checkpoint, plan, recipe, report)

    @cached_property
    def figures(self) -> dict[str, float]:
        """By the names of `FIGURES`; those of quality only where it was measured."""
        found = {"bits_per_param": float(self.plan["bits_per_param"]), "size_bytes": float(self.checkpoint.size_bytes)}
        if self.report and self.report["evaluation"]:
            quality = EvalReport.from_json(self.report["evaluation"]["report"])
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
