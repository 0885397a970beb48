"""The model card: README.md for the Hub, made from what the registry has of a version and from nothing else.

plan.json and recipe.json of the checkpoint, the versions of the tools in its lineage; where there is a report also
licence, quality, sizes, what stays as it is, and the picture of the allocation.

Nobody here asks the Hub whether the header is right: its client does so in every commit with a README.md
(/api/validate-yaml), before the first file is sent, and a refusal ends the push.
"""

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from pipeline.auto_classes import GENERATING, known_class
from pipeline.before_after import before_after
from pipeline.budget import human_bytes
from pipeline.card_header import card_header
from pipeline.command import compress_command, evaluate_command, pinned
from pipeline.markdown import Markdown, markdown_template
from pipeline.origin import base_model_of, last_part, model_name, public_name, without_local_folders
from pipeline.own_code import code_commit
from pipeline.version import requirement
from pipeline.version_documents import reading
from pipeline.version_facts import VersionFacts

if TYPE_CHECKING:
    from registry import Registry, Version

# as in pyproject.toml
MINIMUM_VERSIONS = {"torch": "2.11", "transformers": "5.17"}
ALLOCATION_PICTURE = "heatmap.png"


def write_card(registry: "Registry", version: "Version", repo_id: str, tag: str) -> str:
    """The card of a version that is published as that tag of `repo_id`, with the files of its report below report/.

    Raises:
        CheckpointError: its plan, recipe or report is missing or not as bitsmith writes it.
        RegistryError: the version's files are not all there.
    """
    facts = VersionFacts.of(registry, version)
    with reading(f"The plan, the recipe or the report of {version}"):
        return render_card(facts, repo_id, tag)


def render_card(facts: VersionFacts, repo_id: str, tag: str) -> str:
    """The card's text: a YAML header and Markdown in which no foreign text can become markup."""
    recipe, report, evaluation, statistics = _pinned(facts), facts.report, facts.evaluation, facts.statistics
    base_model = base_model_of(facts.recipe)
    repo_name = repo_id.rpartition("/")[2]
    body = markdown_template("card.md.j2", bytes=human_bytes, file_name=last_part, number="{:,}".format).render(
        base_model=base_model,
        choices=_choices(facts.plan),
        command=compress_command(recipe),
        digest=facts.checkpoint.digest,
        evaluate=evaluate_command(recipe),
        evaluation=evaluation,
        evaluation_text=public_name(evaluation["text"]) if evaluation else None,
        minimum=MINIMUM_VERSIONS,
        name=model_name(recipe["model"], base_model),
        num_params=sum(rows * columns for rows, columns in (m["shape"] for m in facts.plan["matrices"].values())),
        num_windows=statistics.metadata.get("num_windows") if statistics else None,
        auto=known_class(report),
        code=code_commit(facts.recipe),
        generates=known_class(report) in GENERATING,
        picture=ALLOCATION_PICTURE if ALLOCATION_PICTURE in facts.report_files else None,
        plan=facts.plan,
        recipe=recipe,
        report=report,
        requirement=Markdown(requirement()),
        repo_id=repo_id,
        repo_name=repo_name,
        revision=tag,
        rows=before_after(report) if report else [],
        size_bytes=facts.checkpoint.size_bytes,
        tools=facts.tools,
    )
    return f"---\n{card_header(facts, repo_name).to_yaml()}\n---\n\n{body}"


def collection_note(facts: VersionFacts) -> str:
    """What tells a version from its siblings in a collection, on one line of at most 500 characters."""
    figures = facts.figures
    parts = [f"{figures['bits_per_param']:.2f} bits per parameter", human_bytes(figures["size_bytes"])]
    if "kld" in figures:
        parts.append(f"KL {figures['kld']:.2g} nats/token")
    if "perplexity" in figures:
        parts.append(f"perplexity {figures['perplexity']:.4g}")
    return ", ".join(parts)


def _pinned(facts: VersionFacts) -> dict[str, Any]:
    """The recipe without folders of the author's, and with each branch of the Hub as the commit that it was."""
    return without_local_folders(facts.recipe) | pinned(facts.recipe, facts.evaluation)


def _choices(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Label, matrices, parameters and bits per parameter, the smallest first."""
    taken = defaultdict(list)
    for matrix in plan["matrices"].values():
        taken[matrix["label"]].append(matrix)
    rows = []
    for label, matrices in taken.items():
        num_params = sum(matrix["shape"][0] * matrix["shape"][1] for matrix in matrices)
        bits = sum(matrix["size_bits"] for matrix in matrices) / num_params
        rows.append({"label": label, "num_matrices": len(matrices), "num_params": num_params, "bits": bits})
    return sorted(rows, key=lambda row: (row["bits"], row["label"]))
