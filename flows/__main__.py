"""python -m flows deploy|serve|run: the flows by one file of deployments, prefect.yaml."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import flows  # noqa: F401  settings, before Prefect is imported
from flows.configuration import FILE
from pipeline.cli import run_app
from pipeline.display import RESULTS

if TYPE_CHECKING:
    from flows.configuration import Deployment

app = typer.Typer(
    name="python -m flows",
    help="Scheduled compression by Prefect: deployments and schedules as prefect.yaml says. See docs/operating.md.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
File = Annotated[Path, typer.Option("--file", "-f", help="the deployments, in Prefect's own format")]


@app.command()
def deploy(
    file: File = FILE,
    check: Annotated[bool, typer.Option("--check", help="only check the file; no server is asked")] = False,
) -> None:
    """Make the file's deployments on the server that PREFECT_API_URL names, for its workers to run.

    The work pools bitsmith-cpu and bitsmith-gpu are made, and the automations by which a run without a heartbeat is
    Crashed after 90 seconds, and one whose process has not begun after 100. Where the environment has
    BITSMITH_WEBHOOK, its URL is kept as a secret of the server and called for runs that failed, crashed,
    were cancelled, or were refused by a gate.
    """
    from flows.configuration import read_configuration

    deployments = read_configuration(file)
    if check:
        _say(f"{file}: {len(deployments)} deployments, all sound.")
        return
    from flows.deploy import deploy as make

    made = make(deployments)
    for deployment, each in zip(deployments, made.deployments, strict=True):
        _say(f"{each.full_name}  {_when(deployment)}  {deployment.work_pool.name}")
    pools = dict.fromkeys(deployment.work_pool.name for deployment in deployments)
    _say("Automations: " + "; ".join(made.automations))
    _say("A worker runs them: " + "; ".join(f"prefect worker start --pool {pool}" for pool in pools))


@app.command()
def serve(
    file: File = FILE,
    port: Annotated[int, typer.Option(help="of the server that is started where PREFECT_API_URL names none")] = 4200,
    limit: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
) -> None:
    """Run the file's deployments on this machine by their schedules, until stopped; work pools are not needed.

    Where PREFECT_API_URL names no server, one is started, with SQLite, and its pages at http://127.0.0.1:4200.
    """
    from flows.configuration import read_configuration

    deployments = read_configuration(file)
    from flows.serve import serve as run_schedules

    run_schedules(deployments, port=port, limit=limit)


@app.command()
def run(name: Annotated[str, typer.Argument(help="of a deployment in the file")], file: File = FILE) -> None:
    """Run a deployment's flow now, in this process, with its parameters from the file. No server is needed.

    Exit codes: 0 done, or Skipped as nothing was to be done; 1 failed; 3 Gated: all was done, and a gate refused.
    """
    from flows.configuration import find, read_configuration

    deployment = find(read_configuration(file), name)
    from flows.run_here import exit_code, run_here

    state = run_here(deployment)
    _say(f"{deployment.name}: {state.name}{f'. {state.message}' if state.message else ''}")
    raise typer.Exit(exit_code(state))


def _say(text: str) -> None:
    RESULTS.print(text, soft_wrap=True, highlight=False)


def _when(deployment: "Deployment") -> str:
    said = [f"{each.cron or each.rrule or each.interval} {each.timezone or ''}" for each in deployment.all_schedules]
    return ", ".join(map(str.strip, said)) or "no schedule"


def main() -> None:
    """Entry point; errors as of `bitsmith`."""
    run_app(app)


if __name__ == "__main__":
    main()
