"""The flow `evaluate`: quality of a version, or of a folder, beside its original."""

from prefect import flow
from prefect.runtime import flow_run

from flows import quality
from flows.notify import WATCHED
from flows.slots import alone_with
from flows.version import check_version


def run_name() -> str:
    """`smollm2-3bpw:2 on 24 windows`"""
    return f"{flow_run.parameters['what']} on {flow_run.parameters.get('num_windows', 24)} windows"


@flow(name="evaluate", flow_run_name=run_name, **WATCHED)
def evaluate(
    what: str,
    base: str | None = None,
    base_revision: str | None = None,
    dataset: str | None = None,
    dataset_revision: str | None = None,
    num_windows: int = 24,
    seq_len: int = 512,
    registry: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> dict[str, float]:
    """Perplexity, KL divergence and top-1 agreement, as `bitsmith evaluate` measures them.

    Args:
        what: NAME, NAME:NUMBER or NAME@ALIAS, or a folder that `compress` wrote.
        base: the original; by default what the recipe names.
        dataset: .txt, .jsonl, .parquet or a dataset's Hub id; the bundled text by default.
        num_windows, seq_len: windows of the text, and tokens in each.
        trust_remote_code: run the code that the original brings.
    """
    check_version()
    with alone_with(base or quality.original_of(what, registry), device):
        return quality.measure(
            what,
            base,
            base_revision,
            dataset,
            dataset_revision,
            num_windows,
            seq_len,
            registry,
            device,
            trust_remote_code,
        )
