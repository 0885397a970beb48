"""Evaluation outside a compression, as a task."""

from prefect import task
from prefect.artifacts import create_table_artifact

from flows.release import open_registry
from flows.steps import OPENING
from flows.summary import artifact_key


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
) -> dict[str, float]:
    """The figures by name, and all of them as a table beside the run."""
    from flows.progress import RunProgress
    from pipeline.evaluate_folder import base_of, checkpoint_folder, evaluate_folder

    with checkpoint_folder(open_registry(registry), what) as folder:
        made_from, commit = base_of(folder)
        report = evaluate_folder(
            folder,
            base or made_from,
            base_revision=base_revision if base else commit,
            dataset=dataset,
            dataset_revision=dataset_revision,
            num_windows=num_windows,
            seq_len=seq_len,
            device=device,
            progress=RunProgress(),
        )
    rows = [{"": label, "original": before, "compressed": after} for label, before, after in report.rows()]
    create_table_artifact(rows, key=f"{artifact_key(what)}-quality", description=f"Quality of {what}")
    return {
        "perplexity": report.perplexity.mean,
        "base_perplexity": report.base_perplexity.mean,
        "kld": report.kl_divergence.mean,
        "kld_p99": report.kl_p99,
        "top1": report.top1_agreement.to_percent().mean,
    }
