"""The page of a repository with a branch for each budget: a table of all of them, from what lies on the branches."""

import json
from collections.abc import Mapping

from pipeline.auto_classes import known_class
from pipeline.budget import human_bytes
from pipeline.card_header import card_header
from pipeline.eval_report import EvalReport
from pipeline.markdown import Markdown, markdown_template
from pipeline.origin import base_model_of, model_name
from pipeline.own_code import code_commit
from pipeline.version import requirement
from pipeline.version_facts import VersionFacts
from registry import IntegrityError, Overview, RegistryError
from registry.artifact import FileEntry
from registry.publication import MANIFEST, REPORT_FOLDER, Manifest

_REPORT = f"{REPORT_FOLDER}/report.json"
_COLUMNS = {
    "perplexity": "perplexity",
    "kld": "KL divergence, nats/token",
    "top1": "top-1, %",
    "cosine": "cosine similarity",
}


def branch_overview(repo_id: str) -> Overview:
    """How `push` makes README.md of main."""
    paths = (MANIFEST, "plan.json", "recipe.json", _REPORT)
    return Overview(paths, lambda branches: render_overview(repo_id, branches))


def render_overview(repo_id: str, branches: Mapping[str, Mapping[str, bytes]]) -> str:
    """The page's text; no foreign text in it can become markup.

    Args:
        branches: branch -> path -> bytes of its manifest, plan, recipe and, if there is one, report.
    Raises:
        RegistryError: a manifest is damaged, or a file is not what it says.
    """
    facts = {branch: _facts(branch, files) for branch, files in branches.items()}
    by_size = sorted(facts.items(), key=lambda item: (item[1].checkpoint.size_bytes, item[0]))
    rows = [{"branch": branch, **_figures(branch, each)} for branch, each in by_size]
    largest = by_size[-1][1]
    base_model = base_model_of(largest.recipe)
    repo_name = repo_id.rpartition("/")[2]
    texts = {each.evaluation["report"].get("tokens_sha256") for _, each in by_size if each.evaluation}
    is_one_text = len(texts) == 1  # figures of others are not to be compared
    evaluation = largest.evaluation if is_one_text else None
    body = markdown_template("overview.md.j2", bytes=human_bytes).render(
        base_model=base_model,
        auto=known_class(largest.report),
        code=code_commit(largest.recipe),
        columns=[each for each in _COLUMNS.items() if is_one_text and any(each[0] in row for row in rows)],
        texts=len(texts),
        originals=_originals(EvalReport.from_json(evaluation["report"])) if evaluation else {},
        name=model_name(largest.recipe["model"], base_model),
        original_bytes=rows[-1].get("original_bytes"),
        repo_id=repo_id,
        repo_name=repo_name,
        requirement=Markdown(requirement()),
        rows=rows,
    )
    header = card_header(largest, repo_name)
    header.model_name = header.eval_results = None
    if not str(header.get("license_link")).startswith("http"):
        header.license_link = None  # a file of the branch
    header.tags = [tag for tag in header.tags or [] if not tag.endswith("-bit")]
    return f"---\n{header.to_yaml()}\n---\n\n{body}"


def _originals(quality: EvalReport) -> dict[str, float]:
    """What the original has, in the columns' units."""
    perplexity = {"perplexity": quality.base_perplexity.mean} if quality.base_perplexity else {}
    return perplexity | {"kld": 0.0, "top1": 100.0, "cosine": 1.0}


def _figures(branch: str, facts: VersionFacts) -> dict[str, float]:
    try:
        card_header(facts, branch)
        before = {"original_bytes": float(facts.report["sizes"]["folder"]["original"])} if facts.report else {}
        return facts.figures | before
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RegistryError(
            f"Branch {branch} holds a plan, a recipe or a report that bitsmith did not write ({type(error).__name__}: "
            f"{error}), so that the page of the branches cannot be made. Remove that branch, or push its version again."
        ) from error


def _facts(branch: str, files: Mapping[str, bytes]) -> VersionFacts:
    manifest = Manifest.from_json(files[MANIFEST])
    read = {}
    for path in ("plan.json", "recipe.json", *([_REPORT] if manifest.report else [])):
        expected, found = manifest.files.get(path), FileEntry.of_bytes(files.get(path, b""))
        if found != expected:
            what = f"{path} on branch {branch}"
            advice = "Push that version again, or remove the branch."
            raise IntegrityError(
                what, f"sha256 {expected.sha256 if expected else None}", f"sha256 {found.sha256}", advice
            )
        try:
            read[path] = json.loads(files[path])
        except (ValueError, RecursionError) as error:
            raise RegistryError(f"{path} on branch {branch} is not JSON ({error}). Remove that branch.") from error
    return VersionFacts(
        version=None,
        checkpoint=manifest.artifact,
        plan=read["plan.json"],
        recipe=read["recipe.json"],
        report=read.get(_REPORT),
        report_files=frozenset(manifest.report.files) if manifest.report else frozenset(),
        lineage=(manifest.artifact, *manifest.lineage),
    )
