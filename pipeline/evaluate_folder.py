"""Evaluate a compressed folder beside its original, outside any run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from pipeline.calibration import check_fits, token_windows
from pipeline.eval_report import EvalReport
from pipeline.evaluate import evaluate
from pipeline.home import expanded
from pipeline.model import open_model
from pipeline.output import check_compressed, read_recipe
from pipeline.packed import load_with_adapter
from pipeline.progress import SILENT, Progress
from pipeline.quality import original_logits
from registry import Registry


def evaluate_folder(
    folder: Path,
    base: str,
    *,
    base_revision: str | None,
    dataset: str | None,
    dataset_revision: str | None,
    num_windows: int,
    seq_len: int,
    device: str,
    adapter: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> EvalReport:
    """Perplexity, KL divergence and top-1 agreement on the first windows of a text.

    Args:
        adapter: folder that `finetune` wrote for this model.
        trust_remote_code: run the code that the original brings; see pipeline/own_code.py.
    Raises:
        CheckpointError: `folder` is not a sound compressed checkpoint, or the adapter is another model's.
        ModelError, CalibrationError: see pipeline/errors.py.
    """
    network = load_with_adapter(folder, adapter, device, torch.float32, trust_remote_code=trust_remote_code)
    original = open_model(base, revision=base_revision, trust_remote_code=trust_remote_code, progress=progress)
    made_from = read_recipe(folder).get("model_sha256")
    if made_from != original.digest:
        progress.say(f"Note: {folder} was made from another model than {base} (its files differ).")
    tokenizer = original.tokenizer()
    windows = token_windows(
        dataset,
        tokenizer,
        num_windows=num_windows,
        seq_len=seq_len,
        seed=None,
        revision=dataset_revision,
        split="test",
        default="evaluation",
        ends=original.task.ends(tokenizer),
    )
    check_fits(windows, original.config.get_text_config().vocab_size, original.num_positions)
    logits = original_logits(original, windows.tokens, device, progress)
    return evaluate(network, logits, windows.tokens, progress=progress)


@contextmanager
def checkpoint_folder(registry: Registry, what: str) -> Iterator[Path]:
    """`what` itself where it is a folder; else the files of the version that it names, in a temporary one.

    Raises:
        CheckpointError: the folder is no compressed checkpoint.
        RegistryError: there is no such version, or its files are damaged.
    """
    if (folder := expanded(what)).is_dir():
        check_compressed(folder)
        yield folder
        return
    checkpoint = registry.get(registry.version(what).digest)
    with TemporaryDirectory(prefix="bitsmith-") as temporary:
        folder = Path(temporary) / "checkpoint"
        registry.materialize(checkpoint, folder)
        check_compressed(folder)
        yield folder
