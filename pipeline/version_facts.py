"""What the registry has of a version: recipe, plan, report, what it was made from, and the figures that people compare.

A version without a report, such as one whose signature did not cover it when it was pulled, has no quality.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError
from pipeline.eval_report import EvalReport
from pipeline.version_documents import read_document, read_plan, read_recipe, reading

if TYPE_CHECKING:
    from registry import Artifact, Registry, Version

FIGURES = {
    "kld": "KL divergence from the original, nats/token",
    "kld_p99": "its 99th percentile",
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity over the original's",
    "top1": "top-1 agreement with the original, %",
    "cosine": "cosine similarity of an encoder's features with the original's",
    "bits_per_param": "bits per parameter of the compressed matrices",
    "size_bytes": "bytes of all files",
}
PLAN, RECIPE, REPORT = "plan.json", "recipe.json", "report.json"
SIZES = ("bits_per_param", "size_bytes")  # known of every version; the others are measured by its evaluation


@dataclass(frozen=True)
class VersionFacts:
    """One version of a compressed model.

    Attributes:
        version: None where the files were read elsewhere than in a registry.
        plan, recipe: plan.json and recipe.json of the checkpoint; empty where only figures are asked for.
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
        """Read them.

        Raises:
            CheckpointError: it has no plan or no recipe, or one of them or the report is not as bitsmith writes it.
            RegistryError: the version's files are not all there.
        """
        checkpoint = registry.get(version.digest)
        if missing := [name for name in (PLAN, RECIPE) if name not in checkpoint.files]:
            raise CheckpointError(
                f"{version} has no {missing[0]}, so that nobody knows how it was made. Another program made it, or it "
                "is no checkpoint. Choose a version that `bitsmith compress` made."
            )
        return VersionFacts(
            version,
            checkpoint,
            plan=read_plan(registry.path(checkpoint, PLAN), f"{PLAN} of {version}"),
            recipe=read_recipe(registry.path(checkpoint, RECIPE), f"{RECIPE} of {version}"),
            **_report_of(registry, version),
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
            for tool, number in settings_of(artifact, "tools").items():
                found.setdefault(tool, {})[number] = None
        return {tool: list(numbers) for tool, numbers in found.items()}

    @cached_property
    def figures(self) -> dict[str, float]:
        """By the names of `FIGURES`; those of quality only where it was measured."""
        sizes = {"size_bytes": float(self.checkpoint.size_bytes)}
        if self.plan:
            sizes["bits_per_param"] = float(self.plan["bits_per_param"])
        found = sizes | (_quality(self.evaluation) if self.evaluation else {})
        return {name: found[name] for name in FIGURES if name in found}


def figures_of(registry: "Registry", version: "Version") -> dict[str, float]:
    """`VersionFacts.figures` of any version; where there is no plan, without the bits that it would tell.

    Raises:
        CheckpointError: the plan or the report is not as bitsmith writes it.
        RegistryError: the version's files are not all there.
    """
    checkpoint = registry.get(version.digest)
    plan = read_plan(registry.path(checkpoint, PLAN), f"{PLAN} of {version}") if PLAN in checkpoint.files else {}
    return VersionFacts(version, checkpoint, plan, recipe={}, **_report_of(registry, version), lineage=()).figures


def settings_of(artifact: "Artifact", key: str = "settings") -> dict[str, Any]:
    """A part of its metadata; empty where another program wrote something else there."""
    found = artifact.metadata.get(key)
    return found if isinstance(found, dict) else {}


def _quality(evaluation: dict[str, Any]) -> dict[str, float]:
    return figures_of_quality(EvalReport.from_json(evaluation["report"]))


def figures_of_quality(quality: EvalReport) -> dict[str, float]:
    """By the names of `FIGURES`."""
    found = {"kld": quality.kl_divergence.mean, "kld_p99": quality.kl_p99}
    if quality.perplexity and quality.base_perplexity:
        found["perplexity"] = quality.perplexity.mean
        found["perplexity_ratio"] = quality.perplexity.mean / quality.base_perplexity.mean
    if quality.top1_agreement:
        found["top1"] = quality.top1_agreement.to_percent().mean
    if quality.cosine_similarity:
        found["cosine"] = quality.cosine_similarity.mean
    return found


def _report_of(registry: "Registry", version: "Version") -> dict[str, Any]:
    if version.report_digest is None:
        return {"report": None, "report_files": frozenset()}
    report = registry.get(version.report_digest)
    what = f"{REPORT} of {version}"
    content = read_document(registry.path(report, REPORT), what)
    with reading(what):
        if content["evaluation"]:
            _quality(content["evaluation"])
    return {"report": content, "report_files": frozenset(report.files)}
