"""The flow from end to end, under a real server: the plain function's bytes, and failures that read well."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.home import home


@pytest.fixture(scope="module")
def happened() -> list[str]:
    """Each start and end of workers, and the stages between."""
    return []


@pytest.fixture(scope="module")
def finished(
    server: None, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, happened: list[str]
) -> Any:
    """The state of one run of the flow, into the user's registry, which is the test session's own."""
    from flows import cluster, stage
    from flows.compress import compress
    from flows.runner import Runner

    def telling(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (happened.append(name), function(*given))[1]

    class Log(stage.StageLog):
        def stage(self, name: str) -> Any:
            happened.append(name)
            return super().stage(name)

    out = tmp_path_factory.mktemp("flow") / "Tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_started", telling("start", cluster._started))
        patch.setattr(cluster._Kept, "end", telling("end", cluster._Kept.end))
        patch.setattr(stage, "StageLog", Log)
        patch.setattr(Runner, "starts_a_cluster", True)  # threads, as if they were one
        return compress(recipe, str(out), return_state=True)


def test_workers_are_started_once_and_end_with_the_last_matrix(finished: Any, happened: list[str]) -> None:
    """The stages that are not listed are a child's."""
    assert happened == ["costs", "start", "decompose", "end", "end"]


@pytest.mark.usefixtures("quick")
def test_flow_and_function_make_the_same_checkpoint(finished: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    from flows.job import read_outcome
    from pipeline.compress import compress
    from pipeline.recipe import Recipe
    from registry import Registry

    by_flow = read_outcome(*finished.result())
    elsewhere = compress(Recipe.of(**recipe), Registry(tmp_path / "registry"), tmp_path / "plain")
    assert elsewhere.version.digest == by_flow.version.digest
    assert not any(stage.reused for stage in elsewhere.stages)
    assert by_flow.evaluation == elsewhere.evaluation
    assert by_flow.plan == elsewhere.plan
    assert [stage.name for stage in by_flow.stages] == [stage.name for stage in elsewhere.stages]
    assert (by_flow.size_bytes, by_flow.original_bytes) == (elsewhere.size_bytes, elsewhere.original_bytes)


def test_function_finds_everything_done_by_the_flow(finished: Any, recipe: dict[str, Any]) -> None:
    from pipeline.compress import compress
    from pipeline.recipe import Recipe
    from registry import Registry

    (outcome,) = finished.result()
    again = compress(Recipe.of(**recipe), Registry(home() / "registry"), Path(outcome["job"]["out"]))
    assert str(again.version) == outcome["version"] == "Tiny:1"
    assert again.was_finished
    assert all(stage.reused for stage in again.stages if stage.name != "open")


def test_command_finds_everything_done_and_prints_the_table(
    finished: Any, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finished.result()[0]["job"]["out"]
    assert _command(monkeypatch, *_flags(recipe), "-o", out) == 0
    printed = capsys.readouterr().out
    assert "was finished before" in " ".join(printed.split())
    assert printed.count("already done") == 7
    assert "Tiny:1" in printed
    assert "perplexity" in printed


def test_run_is_named_by_model_and_budget(finished: Any, recipe: dict[str, Any]) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(finished.state_details.flow_run_id)
    assert run.name == f"{Path(recipe['model']).name} at 4.5bpw"


def test_summary_stands_beside_the_run(finished: Any) -> None:
    page = _pages(finished)["bitsmith-tiny"]
    assert page.description == finished.result()[0]["version"]
    for expected in ("budget 4.5bpw", "| perplexity |", "| decompose |", "nf4-g64-s8"):
        assert expected in str(page.data)
    (line,) = [line for line in str(page.data).splitlines() if line.startswith("| report |")]
    _, seconds, forecast, peak, expected_peak = (cell.strip() for cell in line.strip("|").split("|"))
    assert float(seconds) > 0
    assert float(forecast) > 0
    assert peak.endswith("B")
    assert expected_peak.endswith("B")


def test_report_and_figures_stand_beside_the_run(finished: Any) -> None:
    pages = _pages(finished)
    out = Path(finished.result()[0]["job"]["out"])
    assert (out / "report" / "index.html").resolve().as_uri() in str(pages["bitsmith-tiny-report"].data)
    figures = json.loads(str(pages["bitsmith-tiny-figures"].data))
    assert {"bits per parameter of the compressed matrices", "perplexity"} <= {row["figure"] for row in figures}
    assert {*figures[0]} == {"figure", "Tiny:1"}  # there is no version before it


def test_only_plain_json_and_no_stored_result_leaves_the_flow(finished: Any) -> None:
    from prefect.results import ResultRecordMetadata

    outcomes = finished.result()
    assert json.loads(json.dumps(outcomes)) == outcomes
    assert not isinstance(finished.data, ResultRecordMetadata)


def test_damaged_weight_ends_failed_with_the_message(
    server: None, recipe: dict[str, Any], damaged_model_dir: Path, tmp_path: Path
) -> None:
    from flows.compress import compress
    from pipeline.errors import NonFiniteError

    damaged = recipe | {"model": str(damaged_model_dir), "sensitivity": "none", "eval_windows": 0}
    state = compress(damaged, str(tmp_path / "out"), return_state=True)
    assert state.is_failed()
    message = str(state.message)
    assert "NonFiniteError: model.layers.1.mlp.down_proj.weight" in message
    assert "Traceback" not in message
    assert len(message.splitlines()) == 1
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        state.result()
    assert not (tmp_path / "out").exists()


def test_command_prints_one_paragraph_and_exits_with_1(
    server: None,
    recipe: dict[str, Any],
    damaged_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = _flags(recipe | {"model": str(damaged_model_dir), "sensitivity": "none", "eval_windows": 0})
    assert _command(monkeypatch, *flags, "-o", str(tmp_path / "out")) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Error: model.layers.1.mlp.down_proj.weight" in " ".join(captured.err.split())
    assert "Traceback" not in captured.err


def test_wrong_setting_fails_before_any_work(server: None, recipe: dict[str, Any], tmp_path: Path) -> None:
    from flows.compress import compress
    from pipeline.errors import RecipeError

    state = compress(recipe | {"budgets": "3bpw"}, str(tmp_path / "out"), return_state=True)
    assert state.is_failed()
    with pytest.raises(RecipeError, match="budgets"):
        state.result()
    assert not list(tmp_path.iterdir())


def _pages(finished: Any) -> dict[str, Any]:
    """What stands beside that run, by key; later runs, which find everything done, have pages of the same keys."""
    from prefect.client.orchestration import get_client

    run = finished.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        return {page.key: page for page in client.read_artifacts() if page.flow_run_id == run}


def _flags(recipe: dict[str, Any]) -> list[str]:
    """The command line of a recipe."""
    flags = [recipe["model"]]
    for key, value in recipe.items():
        if isinstance(value, list):
            flags += [word for entry in value for word in (f"--{key.removesuffix('s')}", str(entry))]
        elif key != "model":
            flags += [f"--{key.replace('_', '-')}", str(value)]
    return flags


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of `python -m flows.compress`, in this process and so on the tests' server."""
    from flows.command import main

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["flows.compress", *arguments])
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0
