"""Evaluation outside a compression, as a task; the work is done in a child process."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from prefect import task
from prefect.artifacts import create_table_artifact

from flows.child import Say, borrowed_child
from flows.progress import RunDisplay, RunProgress
from flows.release import open_registry
from flows.steps import OPENING
from flows.summary import artifact_key
from pipeline.eval_report import EvalReport
from pipeline.home import expanded
from pipeline.output import base_of
from pipeline.version_documents import read_recipe
from pipeline.version_facts import RECIPE, figures_of_quality


class Asked(NamedTuple):
    """What the child is asked for; `options` are those of pipeline.evaluate_folder.evaluate_folder."""

    registry: str | None
    what: str
    base: str | None
    base_revision: str | None
    options: dict[str, Any]
    num_threads: int


@task(**OPENING)
def original_of(what: str, registry: str | None) -> str:
    """The model that a version, or a folder, was made from."""
    if (folder := expanded(what)).is_dir():
        return base_of(folder)[0]
    store = open_registry(registry)
    version = store.version(what)
    recipe = read_recipe(store.path(store.get(version.digest), RECIPE), f"{RECIPE} of {version}")
    return str(recipe["model"])


@task(**OPENING)
def measure(
    what: str,
    base: str | None,
    base_revision: str | None,
    dataset: str | None,
    dataset_revision: str | None,
    num_windows: int,
    seq_len: int,
    registry: str | None,
    device: str,
    trust_remote_code: bool,
) -> dict[str, float]:
    """The figures by name, and all of them as a table beside the run."""
    options: dict[str, Any] = {"dataset": dataset, "dataset_revision": dataset_revision}
    options |= {"num_windows": num_windows, "seq_len": seq_len}
    options |= {"device": device, "trust_remote_code": trust_remote_code}
    asked = Asked(registry, what, base, base_revision, options, torch.get_num_threads())
    with borrowed_child() as child:
        report: EvalReport = child.call(evaluate_in_child, asked, RunDisplay(), doing="evaluate")
    rows = [{"": label, "original": before, "compressed": after} for label, before, after in report.rows()]
    create_table_artifact(rows, key=f"{artifact_key(what)}-quality", description=f"Quality of {what}")
    original = {"base_perplexity": report.base_perplexity.mean} if report.base_perplexity else {}
    return figures_of_quality(report) | original


def evaluate_in_child(asked: Asked, say: Say) -> EvalReport:
    """The version or folder beside its original, which is by default what its recipe names."""
    from pipeline.evaluate_folder import checkpoint_folder, evaluate_folder

    torch.set_num_threads(asked.num_threads)
    progress = RunProgress(lambda said: say(replace(said, stage="evaluate")))
    with checkpoint_folder(open_registry(asked.registry), asked.what) as folder:
        made_from, commit = base_of(folder)
        base, revision = (asked.base, asked.base_revision) if asked.base else (made_from, commit)
        return evaluate_folder(folder, base, base_revision=revision, progress=progress, **asked.options)
