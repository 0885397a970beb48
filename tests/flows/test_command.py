"""The flow's command line: light until it has work to do, and the same flags as `bitsmith compress`."""

import subprocess
import sys

import pytest

RUN = """import runpy, sys
try: runpy.run_module('flows.compress', run_name='__main__')
except SystemExit: pass
"""
HEAVY = ("torch", "transformers", "datasets", "prefect.server")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    tell = f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    return subprocess.run(
        [sys.executable, "-c", RUN + tell, *arguments], capture_output=True, text=True, timeout=60, check=True
    )


def test_help_imports_nothing_heavy() -> None:
    done = _run("--help")
    assert "--budget" in done.stdout
    assert done.stderr.strip() == "[]"


def test_wrong_arguments_are_told_without_heavy_imports() -> None:
    done = _run("no/such/model/at/all", "--budget", "3bpw", "-o", "out")
    error, modules = done.stderr.strip().rsplit("\n", 1)
    assert error.startswith("Error: No model at no/such/model/at/all")
    assert modules == "[]"


def test_flags_are_those_of_the_plain_command() -> None:
    import typer

    from flows import command
    from pipeline import cli

    plain = typer.main.get_command(cli.app).commands["compress"]  # type: ignore[attr-defined]
    ours = typer.main.get_command(command.app)
    shared = [parameter.opts for parameter in plain.params]
    assert [parameter.opts for parameter in ours.params] == [*shared, ["--runner"]]


@pytest.mark.parametrize("arguments", [("model",), ("model", "--no-such-flag")])
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.compress", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr
