"""`bitsmith finetune`: the arguments, the plan before the run, and the result."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from pipeline.console import print_json, progress_of
from pipeline.devices import device_of
from pipeline.display import ERRORS, RESULTS, new_table
from pipeline.errors import RecipeError
from pipeline.finetune_settings import FinetuneSettings
from pipeline.home import expanded
from pipeline.options import AsJson, DatasetRevision, Device, FolderArgument, Quiet, TrustRemoteCode
from pipeline.output import check_compressed

if TYPE_CHECKING:
    from pipeline.conversations import Examples
    from pipeline.finetune import Finetuned


def _help(field: str) -> str:
    return FinetuneSettings.model_fields[field].description or ""


def _default(field: str) -> Any:
    return FinetuneSettings.model_fields[field].default


def finetune(
    folder: FolderArgument,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="instructions: .jsonl, .parquet or a dataset's Hub id, with messages, instruction/output, "
            "prompt/completion or question/answer, or plain text; else the bundled ones"
        ),
    ] = None,
    dataset_revision: DatasetRevision = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder for the adapter; FOLDER-adapter by default")
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(help="also write a dense bfloat16 model with the adapter inside, into that folder")
    ] = None,
    steps: Annotated[int, typer.Option(help=_help("steps"))] = _default("steps"),
    start: Annotated[str, typer.Option(help=f"factors: {_help('start')}: zero")] = _default("start"),
    rank: Annotated[int, typer.Option(help=_help("rank"))] = _default("rank"),
    learning_rate: Annotated[float, typer.Option(help=_help("learning_rate"))] = _default("learning_rate"),
    batch_size: Annotated[int, typer.Option(help=_help("batch_size"))] = _default("batch_size"),
    seq_len: Annotated[int, typer.Option(help=_help("seq_len"))] = _default("seq_len"),
    most_rows: Annotated[int, typer.Option(help=_help("most_rows"))] = _default("most_rows"),
    check_every: Annotated[int, typer.Option(help=_help("check_every"))] = _default("check_every"),
    seed: Annotated[int, typer.Option(help="of the order of the examples and of new factors")] = _default("seed"),
    resume: Annotated[bool, typer.Option(help="go on from an unfinished run; --no-resume starts over")] = True,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Finetune a compressed model on instruction data: train a LoRA adapter through its packed weights.

    Conversations go through the model's chat template; the answers alone are learnt. The weights stay packed, so it
    takes about the memory of the checkpoint, not of the original. The last examples, an eighth of them and 16 at most,
    are never trained on: the adapter is that of the step with the lowest loss on them, or the last one's where none was
    below the start's. It belongs to this checkpoint and is refused on any other.
    """
    given = {
        "steps": steps,
        "start": start,
        "rank": rank,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "most_rows": most_rows,
        "check_every": check_every,
        "seed": seed,
    }
    try:
        FinetuneSettings.model_validate(given)
    except ValidationError as error:
        raise _wrong(error) from None
    check_compressed(folder)
    folder = folder.resolve()
    output = expanded(output or folder.with_name(f"{folder.name}-adapter")).absolute()
    target = device_of(device)
    _require_peft()
    from pipeline.finetune import finetune
    from pipeline.merged import check_merged_folder, write_merged
    from pipeline.own_code import names_code
    from pipeline.training import compute_of

    if merged is not None:
        merged = expanded(merged).absolute()
        if merged == output:
            raise RecipeError("The adapter and the merged model need a folder each: give --merged another one than -o.")
        if trust_remote_code and names_code(folder):
            raise RecipeError(
                "This model brings code of its own, and --merged writes models of transformers' own classes only. "
                "Leave it out: the adapter works on the checkpoint."
            )
        check_merged_folder(merged, output)
    done = finetune(
        folder,
        dataset,
        FinetuneSettings.model_validate(given | {"compute": compute_of(target)}),
        output,
        dataset_revision=dataset_revision,
        trust_remote_code=trust_remote_code,
        device=target,
        resume=resume,
        progress=progress_of(quiet),
        on_start=(lambda *_: None)
        if quiet
        else (lambda *found: _show_start(folder, output, steps, batch_size, *found)),
    )
    if merged is not None:
        progress_of(quiet).say(f"Merging into {merged} ...")
        write_merged(folder, output, merged)
    if as_json:
        print_json({"folder": str(output), "was_finished": done.was_finished} | done.report.to_json())
    elif quiet:
        RESULTS.print(str(output), soft_wrap=True)
    else:
        _show_result(done, merged)


def _wrong(error: ValidationError) -> RecipeError:
    first = error.errors()[0]
    option = "--" + str(first["loc"][0]).replace("_", "-")
    return RecipeError(f"{option} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}.")


def _require_peft() -> None:
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise RecipeError("Finetuning needs peft. Install it with `pip install 'bitsmith[finetune]'`.")


def _show_start(
    folder: Path, output: Path, steps: int, batch_size: int, examples: "Examples", num_trained: int
) -> None:
    tokens = sum(len(item.tokens) for item in examples.items) / len(examples)
    ERRORS.print(
        f"Finetune {folder}: {num_trained:,} parameters, {steps} steps of {batch_size} out of {len(examples)} examples "
        f"from {examples.source} with {tokens:.0f} tokens on average -> {output}",
        soft_wrap=True,
        highlight=False,
    )


def _show_result(done: "Finetuned", merged: Path | None) -> None:
    if done.was_finished:
        RESULTS.print(f"{done.folder} was finished before; nothing was done anew.", soft_wrap=True)
    table = new_table(title="Result")
    table.add_row("finetuning", done.report.meaning)
    table.add_row("adapter", str(done.folder))
    table.add_row("report", str(done.folder / "report" / "index.html"))
    if merged is not None:
        table.add_row("merged model", str(merged))
    RESULTS.print(table)
