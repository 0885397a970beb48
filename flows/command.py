"""python -m flows.compress: flags, checks, tables and exit codes of `bitsmith compress`, the work in a flow.

Without PREFECT_API_URL, Prefect starts a server for the time of the run.
"""

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import cli
from registry import Registry

if TYPE_CHECKING:
    from pipeline.compress import Compressed
    from pipeline.sweep import Sweep

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def compress(**arguments: Any) -> None:
    """Compress a model to the budget as a Prefect flow; flags and result as of `bitsmith compress`."""
    runner = arguments.pop("runner")

    def in_flow(*recipes_registry_output: Any, **options: Any) -> "Compressed | Sweep":
        return _compress_in_flow(*recipes_registry_output, runner=runner, **options)

    cli.compress_and_show(arguments, in_flow)


RUNNER = Annotated[
    str,
    typer.Option(
        help="Where matrices are measured and decomposed: threads, dask or ray; with a number of workers (dask:4), or "
        "a cluster's address (dask:tcp://scheduler:8786, ray:ray://head:10001)."
    ),
]
_flags = inspect.signature(cli.compress).parameters.values()  # typer reads them from there
_runner = inspect.Parameter("runner", inspect.Parameter.KEYWORD_ONLY, default="threads", annotation=RUNNER)
compress.__signature__ = inspect.Signature([*_flags, _runner])  # type: ignore[attr-defined]
app.command()(compress)


def main() -> None:
    """Entry point; exit codes as of `bitsmith`."""
    cli.run_app(app)


def _compress_in_flow(
    recipes: Any, registry: Registry, output: Path, *, quiet: bool, **options: Any
) -> "Compressed | Sweep":
    from flows.named_server import check_server_if_named

    check_server_if_named()
    from flows.compress import compress
    from flows.job import read_outcome
    from pipeline.sweep import Sweep

    if quiet:
        logging.getLogger("prefect").setLevel(logging.ERROR)
    options["registry"], output = str(registry.root.absolute()), output.absolute()  # a flow's are below BITSMITH_HOME
    budgets = [recipe.budget for recipe in recipes]
    done = [read_outcome(outcome) for outcome in compress(recipes[0].to_json(), str(output), budgets, **options)]
    return done[0] if len(done) == 1 else Sweep(output, tuple(done))
