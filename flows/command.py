"""python -m flows.compress: flags, checks, tables and exit codes of `bitsmith compress`, the work in a flow.

Without PREFECT_API_URL, Prefect starts a server for the time of the run.
"""

import logging
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from pipeline import cli
from registry import Registry

if TYPE_CHECKING:
    from pipeline.compress import Compressed
    from pipeline.sweep import Sweep

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(help="Compress a model to the budget as a Prefect flow; flags and result as of `bitsmith compress`.")
@wraps(cli.compress)  # typer reads the flags from there
def compress(**arguments: Any) -> None:
    cli.compress_and_show(arguments, _compress_in_flow)


def main() -> None:
    """Entry point; exit codes as of `bitsmith`."""
    cli.run_app(app)


def _compress_in_flow(
    recipes: Any, registry: Registry, output: Path, *, quiet: bool, **options: Any
) -> "Compressed | Sweep":
    from flows.compress import compress
    from flows.job import read_outcome
    from pipeline.sweep import Sweep

    if quiet:
        logging.getLogger("prefect").setLevel(logging.ERROR)
    options["registry"] = str(registry.root)
    budgets = [recipe.budget for recipe in recipes]
    done = [read_outcome(outcome) for outcome in compress(recipes[0].to_json(), str(output), budgets, **options)]
    return done[0] if len(done) == 1 else Sweep(output, tuple(done))
