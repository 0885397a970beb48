"""The flow `collect-garbage`: what no version needs leaves the registry."""

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run

from flows.notify import WATCHED
from flows.release import open_registry
from flows.steps import PLAIN
from flows.version import check_version
from pipeline.budget import human_bytes
from pipeline.span import span_seconds


def run_name() -> str:
    """`what was not used for 14d, dry run`"""
    dry = ", dry run" if flow_run.parameters.get("dry_run") else ""
    return f"what was not used for {flow_run.parameters.get('grace', '14d')}{dry}"


@flow(name="collect-garbage", flow_run_name=run_name, **WATCHED)
def collect_garbage(grace: str = "14d", dry_run: bool = False, registry: str | None = None) -> int:
    """Remove results and files that no version, no running process and nobody within the grace needs.

    Args:
        grace: what was used within this time stays: 14d, 12h, 30m or 0s.
        dry_run: only say what would go.
    Returns:
        Bytes.
    """
    check_version()
    return collect(grace, dry_run, registry)


@task(**PLAIN)
def collect(grace: str, dry_run: bool, registry: str | None) -> int:
    """As `bitsmith registry gc`, with a table of what went."""
    collected = open_registry(registry).collect_garbage(grace_seconds=span_seconds(grace), dry_run=dry_run)
    rows = [
        {"kind": made.kind, "what": made.digest[:16], "size": human_bytes(made.size_bytes)}
        for made in collected.artifacts
    ]
    rows += [{"kind": "unfinished work", "what": folder.name[:16], "size": ""} for folder in collected.folders]
    verb = "would go" if dry_run else "removed"
    said = f"{human_bytes(collected.size_bytes)} {verb}: {len(rows)} entries, {collected.num_blobs} files"
    create_table_artifact(rows, key="bitsmith-garbage", description=said)
    return collected.size_bytes
