"""The model card: README.md for the Hub, made from what the registry has of a version and from nothing else.

The checkpoint's plan.json and recipe.json always; the report's report.json where there is one (a version that
was pulled has none), which adds licence, quality, sizes and what was left as it is. The header follows
huggingface.co/docs/hub/model-cards.
"""

import html
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from pipeline.before_after import before_after
from pipeline.budget import human_bytes
from pipeline.command import compress_command, evaluate_command, without_local_folders
from pipeline.origin import hub_id, model_name
from pipeline.version_facts import VersionFacts

if TYPE_CHECKING:
    from registry import Registry, Version

# as in pyproject.toml
MINIMUM_VERSIONS = {"torch": "2.11", "transformers": "5.17"}
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TEXT_FILES = (".txt", ".jsonl", ".parquet")


def write_card(registry: "Registry", version: "Version", repo_id: str) -> str:
    """The card of a version that is published as `repo_id`.

    Raises:
        RegistryError: the version's files are not all there.
    """
    facts = VersionFacts.of(registry, version)
    return render_card(
        plan=facts.plan,
        recipe=facts.recipe,
        report=facts.report,
        repo_id=repo_id,
        revision=f"v{version.number}",
        digest=version.digest,
        size_bytes=facts.checkpoint.size_bytes,
    )


def render_card(
    *,
    plan: dict[str, Any],
    recipe: dict[str, Any],
    report: dict[str, Any] | None,
    repo_id: str,
    revision: str,
    digest: str,
    size_bytes: int,
) -> str:
    """The card's text: a YAML header and Markdown in which no foreign text can become markup.

    Args:
        plan, recipe, report: plan.json, recipe.json, report.json; None where there was no report.
        revision: the tag on the Hub.
        digest, size_bytes: of the checkpoint.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    base_model = hub_id(recipe["model"], recipe.get("model_commit"))
    header = ModelCardData(**header_fields(plan, recipe, report, base_model)).to_yaml()
    environment = Environment(
        loader=PackageLoader("pipeline"),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"bytes": human_bytes, "number": "{:,}".format, "text": _text, "code": _code}
    public = without_local_folders(recipe)
    body = environment.get_template("card.md.j2").render(
        base_model=base_model,
        choices=_choices(plan),
        command=_one_line(compress_command(public)),
        digest=digest,
        evaluate=_one_line(evaluate_command(public)),
        minimum=MINIMUM_VERSIONS,
        name=model_name(recipe["model"], base_model),
        num_params=sum(rows * columns for rows, columns in (m["shape"] for m in plan["matrices"].values())),
        plan=plan,
        recipe=public,
        report=report,
        repo_id=repo_id,
        revision=revision,
        rows=before_after(report) if report else [],
        size_bytes=size_bytes,
        version=recipe.get("bitsmith"),
    )
    return f"---\n{header}\n---\n\n{body}"


def header_fields(
    plan: dict[str, Any], recipe: dict[str, Any], report: dict[str, Any] | None, base_model: str | None
) -> dict[str, Any]:
    """The header; what is not known is left out."""
    origin = report["origin"] if report else {}
    fields = {
        "base_model": base_model,
        "base_model_relation": "quantized" if base_model else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": origin.get("license"),
        "license_name": origin.get("license_name"),
        "license_link": origin.get("license_link"),
        "language": list(origin.get("language", ())),
        "datasets": _datasets(recipe),
        "tags": ["bitsmith", "quantized", "lq-lora", f"{int(plan['bits_per_param'] + 0.5)}-bit"],
    }
    return {key: value for key, value in fields.items() if value}


def _datasets(recipe: dict[str, Any]) -> list[str]:
    """The calibration data, if they are on the Hub: a file's name ends in its kind, a path has a folder."""
    name = (recipe.get("dataset") or "").partition(":")[0]
    used = recipe.get("sensitivity", "fisher") != "none" or recipe.get("recover", False)
    return [name] if used and _DATASET_ID.fullmatch(name) and not name.endswith(_TEXT_FILES) else []


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


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def _text(value: Any) -> str:
    """Foreign text as plain words: HTML and Markdown escaped, on one line."""
    return _MARKDOWN.sub(r"\\\1", html.escape(_one_line(value), quote=False))


def _code(value: Any) -> str:
    """Foreign text as a code span, which nothing in it can end; `|` would end a table's cell."""
    content = _one_line(value).replace("|", "\\|")
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{space}{content}{space}{fence}"
