"""The command line: `bitsmith` or `python -m pipeline`.

Each command is a thin call on the library. Heavy imports (torch takes seconds) happen inside commands and
after the arguments and the model folder have been checked, so that help and errors come at once.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.arguments import recipes_of
from pipeline.console import open_registry, print_json, progress_of
from pipeline.devices import device_of
from pipeline.display import ERRORS, RESULTS
from pipeline.errors import PipelineError, RecipeError
from pipeline.finetune_cli import finetune
from pipeline.home import home, output_path
from pipeline.hub_cli import pull, push
from pipeline.memory import is_shortage
from pipeline.options import (
    Adapter,
    AsJson,
    BudgetOption,
    Candidate,
    CostRows,
    Dataset,
    DatasetRevision,
    Device,
    Embeddings,
    EvalDataset,
    EvalDatasetRevision,
    EvalSeqLen,
    EvalWindows,
    FactorBits,
    FolderArgument,
    ModelArgument,
    Name,
    NumSamples,
    Output,
    Override,
    Preset,
    Quiet,
    Rank,
    Recover,
    RecoverCeWeight,
    RecoverHiddenWeight,
    RecoverKlWeight,
    RecoverLearningRate,
    RecoverSamples,
    RecoverSteps,
    RecoverTrain,
    Revision,
    Seed,
    Sensitivity,
    SeqLen,
    ShareGroups,
    Solver,
    TrustRemoteCode,
)
from pipeline.output import check_compressed, check_free
from pipeline.quiet import first_line
from pipeline.registry_cli import registry_app
from pipeline.sweep_folder import check_sweep_folder
from registry import Registry, RegistryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.compress import Compressed
    from pipeline.sweep import Sweep

app = typer.Typer(
    name="bitsmith",
    help="Compress a Hugging Face language model to an exact memory budget: W ~ Q + L1 L2, by an integer program.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(registry_app, name="registry")


@app.command()
def inspect(
    model: ModelArgument,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List a model's matrices, their groups, what would be skipped and why, and sizes."""
    _check_model(model, revision, quiet)
    from dataclasses import asdict

    from pipeline.display import show_model
    from pipeline.model import open_model

    opened = open_model(model, revision=revision, trust_remote_code=trust_remote_code, progress=progress_of(quiet))
    if as_json:
        print_json(
            {
                "model": model,
                "matrices": [asdict(matrix) for matrix in opened.matrices],
                "skipped": [asdict(entry) for entry in opened.skipped],
                "num_params": opened.num_params,
                "num_matrix_params": opened.num_matrix_params,
                "size_bytes": opened.size_bytes,
            }
        )
    elif not quiet:
        show_model(opened)


@app.command()
def plan(
    model: ModelArgument,
    budget: BudgetOption,
    dry_run: Annotated[bool, typer.Option(help="keep no result, neither in the registry nor elsewhere")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    preset: Preset = "default",
    rank: Rank = None,
    factor_bits: FactorBits = None,
    dataset: Dataset = None,
    dataset_revision: DatasetRevision = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    sensitivity: Sensitivity = None,
    candidate: Candidate = None,
    override: Override = None,
    embeddings: Embeddings = None,
    share_groups: ShareGroups = None,
    cost_rows: CostRows = None,
    solver: Solver = None,
    eval_dataset: EvalDataset = None,
    eval_dataset_revision: EvalDatasetRevision = None,
    eval_windows: EvalWindows = None,
    eval_seq_len: EvalSeqLen = None,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say what every matrix would get, how large the result would be, to the byte, and what making it will take.

    Measures costs unless the registry has them. Without --dry-run they are kept there, and `compress` with the same
    settings goes on from them. (A GGUF file is turned into safetensors once in any case.)

    Of several budgets (2.5bpw,3bpw,180MB) it shows sizes and predicted costs in one table.
    """
    recipes = recipes_of(locals())
    _check_model(model, revision, quiet)
    from pipeline.display import show_forecast, show_plan
    from pipeline.display_sweep import show_plans
    from pipeline.planning import make_plans

    made = make_plans(
        recipes,
        home() / "registry",
        device=device_of(device),
        dry_run=dry_run,
        progress=progress_of(quiet),
        on_start=(lambda stages: None) if quiet else show_forecast,
    )
    if as_json:
        contents = [planned.to_json() for planned in made]
        print_json(contents if len(made) > 1 else contents[0])
    elif not quiet and len(made) == 1:
        show_plan(made[0])
    elif not quiet:
        show_plans(made)


@app.command()
def compress(
    model: ModelArgument,
    budget: BudgetOption,
    output: Output,
    name: Name = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    preset: Preset = "default",
    rank: Rank = None,
    factor_bits: FactorBits = None,
    dataset: Dataset = None,
    dataset_revision: DatasetRevision = None,
    num_samples: NumSamples = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    sensitivity: Sensitivity = None,
    candidate: Candidate = None,
    override: Override = None,
    embeddings: Embeddings = None,
    share_groups: ShareGroups = None,
    cost_rows: CostRows = None,
    solver: Solver = None,
    recover: Recover = None,
    recover_samples: RecoverSamples = None,
    recover_steps: RecoverSteps = None,
    recover_learning_rate: RecoverLearningRate = None,
    recover_kl_weight: RecoverKlWeight = None,
    recover_hidden_weight: RecoverHiddenWeight = None,
    recover_ce_weight: RecoverCeWeight = None,
    recover_train: RecoverTrain = None,
    eval_dataset: EvalDataset = None,
    eval_dataset_revision: EvalDatasetRevision = None,
    eval_windows: EvalWindows = None,
    eval_seq_len: EvalSeqLen = None,
    resume: Annotated[bool, typer.Option(help="go on from an unfinished run; --no-resume starts over")] = True,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compress a model to the budget, audit and evaluate the result, and publish it in the registry.

    Several budgets, as in `--budget 2.5bpw,3bpw,40% -o OUT`, make a checkpoint each, in OUT/2.5bpw, OUT/3bpw and
    OUT/40pct. Their versions are called NAME-2.5bpw and so on, where NAME is --name or the name of OUT. Statistics and
    cost table are measured once for all. OUT/index.html compares them (OUT/pareto.png, OUT/pareto.json) and links their
    reports; another list with the same OUT and settings adds to them. All budgets are checked before the work starts.
    """
    compress_and_show(locals(), _compress_here)


def compress_and_show(arguments: dict[str, Any], engine: "Callable[..., Compressed | Sweep]") -> None:
    """Check the arguments of `compress`, let `engine` do the work, and show its result.

    Args:
        arguments: the command's parameters by name.
        engine: called as engine(recipes, registry, output, name=, device=, resume=, quiet=); gives a Sweep for
            several recipes, which differ in the budget.
    Raises:
        PipelineError, RegistryError: see `run_app`.
    """
    recipes = recipes_of(arguments)
    output, quiet = output_path(arguments["output"]), arguments["quiet"]
    (check_free if len(recipes) == 1 else check_sweep_folder)(output)
    _check_model(arguments["model"], arguments["revision"], quiet)
    done = engine(
        recipes,
        open_registry(),
        output,
        name=arguments["name"],
        device=device_of(arguments["device"]),
        resume=arguments["resume"],
        quiet=quiet,
    )
    if arguments["as_json"]:
        print_json(done.to_json())
    elif quiet:
        RESULTS.print(str(done.folder), soft_wrap=True)
    else:
        _show(done, output)


def _show(done: Any, output: Path) -> None:
    from pipeline.compress import Compressed
    from pipeline.display import show_result
    from pipeline.display_sweep import show_sweep

    if done.was_finished:
        RESULTS.print(f"{output} was finished before; nothing was done anew.", soft_wrap=True)
    if isinstance(done, Compressed):
        show_result(done)
    else:
        show_sweep(done)


def _compress_here(
    recipes: Any, registry: Registry, output: Path, *, quiet: bool, **options: Any
) -> "Compressed | Sweep":
    from pipeline.compress import compress
    from pipeline.display import show_start
    from pipeline.display_sweep import show_sweep_start
    from pipeline.sweep import compress_budgets

    def on_start(run_or_parts: Any) -> None:
        show = show_start if len(recipes) == 1 else show_sweep_start
        if not quiet:
            show(run_or_parts, output)

    options |= {"progress": progress_of(quiet), "on_start": on_start}
    if len(recipes) == 1:
        return compress(recipes[0], registry, output, **options)
    return compress_budgets(recipes, registry, output, **options)


@app.command()
def evaluate(
    folder: FolderArgument,
    base: Annotated[str, typer.Option(help="the original model: folder, Hub id, GGUF file, or `demo`")],
    base_revision: Revision = None,
    dataset: EvalDataset = None,
    dataset_revision: DatasetRevision = None,
    num_windows: Annotated[int, typer.Option(min=1, help="windows to evaluate on, from the start of the text")] = 24,
    seq_len: Annotated[int, typer.Option(min=2, help="tokens of a window")] = 512,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of a compressed folder beside its original."""
    check_compressed(folder)
    _check_model(base, base_revision, quiet)
    from pipeline.display import show_evaluation
    from pipeline.evaluate_folder import evaluate_folder

    report = evaluate_folder(
        folder,
        base,
        base_revision=base_revision,
        dataset=dataset,
        dataset_revision=dataset_revision,
        num_windows=num_windows,
        seq_len=seq_len,
        device=device_of(device),
        adapter=adapter,
        trust_remote_code=trust_remote_code,
        progress=progress_of(quiet),
    )
    if as_json:
        print_json(report.to_json())
    else:
        show_evaluation(report)


@app.command()
def generate(
    folder: FolderArgument,
    prompt: Annotated[str, typer.Argument(help="text to go on from")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="at most so many tokens")] = 64,
    chat: Annotated[bool, typer.Option(help="send the prompt through the chat template")] = False,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
) -> None:
    """Continue a text with a compressed model, token by token as they come."""
    if not prompt.strip():
        raise RecipeError("The prompt is empty. Give some text to go on from.")
    check_compressed(folder)
    from pipeline.generate import stream_text

    stream_text(
        folder,
        prompt,
        max_new_tokens=max_new_tokens,
        chat=chat,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
        device=device_of(device),
    )


app.command()(finetune)
app.command()(push)
app.command()(pull)


SAME_REQUEST_SECONDS = 1.0  # `timeout` and some shells signal a process, and then its group


class Stopped(BaseException):
    """A signal asked the program to stop; not a KeyboardInterrupt, which typer would answer in its own way."""


def main() -> None:
    """Entry point of `bitsmith`."""
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """A command line's exit codes: 1 and one paragraph for a known error, 130 for Ctrl-C, 143 for SIGTERM."""
    asked: list[int] = []
    first_at = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal first_at
        asked.append(number)
        if len(asked) == 1:
            first_at = time.monotonic()
            raise Stopped(number)
        # raised again, it would break off the shutdown of workers, for which Python then waits for good
        if time.monotonic() - first_at > SAME_REQUEST_SECONDS:
            os._exit(128 + asked[0])  # workers end with their parent

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before huggingface_hub is imported, which reads it then
    try:
        app()
    except BaseException as error:
        if asked and not (
            isinstance(error, SystemExit) and not error.code
        ):  # whatever came of it: native code may answer with an error of its own
            _end("Stopped. What is finished is kept: run the same command again to go on.", 128 + asked[0])
        if isinstance(error, PipelineError | RegistryError):
            _end(f"Error: {error}", 1)
        if is_shortage(error):
            advice = "Use shorter windows (--seq-len) or texts, --device cpu instead of a GPU, or a larger machine."
            _end(f"Error: out of memory ({first_line(error)[:200]}). {advice}", 1)
        if isinstance(error, OSError):
            _end(f"Error: {error}. Check the disk and the path, then run the command again.", 1)
        raise


def _end(message: str, code: int) -> None:
    ERRORS.print(message, soft_wrap=True, highlight=False, style="red" if code == 1 else None)
    sys.exit(code)


def _check_model(spec: str, revision: str | None, quiet: bool) -> None:
    """Find the folder and read its headers, without torch: most mistakes end here."""
    from pipeline.shards import read_folder
    from pipeline.sources import find_source

    read_folder(find_source(spec, revision, progress_of(quiet)).path)
