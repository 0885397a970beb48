"""sweep, evaluate, publish and collect-garbage, in this process, and what `run` makes of their ends."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from registry import NotFoundError, Registry
from tests.pipeline.small import be_quick


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def swept(
    server: str, recipe: dict[str, Any], tiny_model_dir: Path, registry: str, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Two models, of which one does not exist, and a recipe."""
    from prefect import flow_engine

    from flows.sweep import sweep

    out = tmp_path_factory.mktemp("swept")
    plain = {key: value for key, value in recipe.items() if key not in ("model", "budget")}
    recipes = {"plain": plain | {"sensitivity": "none", "eval_windows": 0}}
    models = [str(out / "gone"), str(tiny_model_dir)]
    with pytest.MonkeyPatch.context() as patch:
        be_quick(patch.setattr)
        # as where the server's first answer was lost, and the second one is that the run had ended before
        ask = flow_engine.propose_state_sync
        patch.setattr(flow_engine, "propose_state_sync", lambda *given, **named: _without_data(ask(*given, **named)))
        return sweep(models, recipes, ["4.5bpw"], str(out), registry, return_state=True)


def _without_data(state: Any) -> Any:
    return state.model_copy(update={"data": None}) if state.is_completed() else state


def _version(registry: str) -> str:
    (version,) = Registry(Path(registry)).versions()
    return str(version)


def test_one_that_fails_does_not_stop_the_others_and_is_named(swept: Any, registry: str, tiny_model_dir: Path) -> None:
    assert (swept.is_failed(), swept.name) == (True, "Failed")
    assert swept.message.startswith("1 of 2 failed. gone-plain: ")
    assert "No model at" in swept.message
    assert _version(registry) == f"{tiny_model_dir.name}-plain:1"


def test_the_sweep_has_a_table_with_a_line_a_pair(swept: Any) -> None:
    import json

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        (page,) = [page for page in client.read_artifacts() if page.key == "bitsmith-sweep"]
    assert [row["state"] for row in json.loads(str(page.data))] == ["Failed", "Completed"]


def test_models_of_one_name_are_refused() -> None:
    from flows.sweep import pairs
    from pipeline.errors import RecipeError

    with pytest.raises(RecipeError, match="base-plain"):
        pairs.fn(["alice/base", "bob/base"], {"plain": {}}, "out")


def test_evaluate_takes_a_version_and_measures_as_the_command(
    swept: Any, registry: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nobody else works on the original."""
    import importlib

    from flows import quality
    from pipeline.evaluate_folder import evaluate_folder

    module, held = importlib.import_module("flows.evaluate"), []
    plain = module.alone_with
    monkeypatch.setattr(module, "alone_with", lambda *names: held.append(names) or plain(*names))
    store, version = Registry(Path(registry)), _version(registry)
    figures = module.evaluate(version, str(tiny_model_dir), num_windows=2, seq_len=32, registry=registry)
    assert held == [(str(tiny_model_dir), "cpu")]
    store.materialize(store.get(store.version(version).digest), tmp_path / "folder")
    for what in (version, str(tmp_path / "folder")):
        assert quality.original_of.fn(what, registry) == tiny_model_dir.name
    options: dict[str, Any] = {"base_revision": None, "dataset": None, "dataset_revision": None}
    options |= {"num_windows": 2, "seq_len": 32, "device": "cpu"}
    report = evaluate_folder(tmp_path / "folder", str(tiny_model_dir), **options)
    assert (figures["kld"], figures["perplexity"]) == (report.kl_divergence.mean, report.perplexity.mean)


def test_a_version_that_a_gate_refuses_is_not_published(swept: Any, registry: str) -> None:
    """No Hub is asked: none could be reached here."""
    from flows.publish import publish

    state = publish(_version(registry), "alice/small", gates=["kld<=1"], registry=registry, return_state=True)
    assert (state.is_failed(), state.name) == (True, "Gated")
    assert "kld was not measured, wanted <=1 (not met)" in state.message


def test_garbage_is_told_and_stays_in_a_dry_run_and_goes_in_another(server: str, tmp_path: Path) -> None:
    """Made by another process: what this one adds stays as long as it lives."""
    from flows.collect_garbage import collect_garbage

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(1000))
    code = (
        "import sys; from pathlib import Path; from registry import Registry; "
        "print(Registry(Path(sys.argv[1])).add_artifact('checkpoint', Path(sys.argv[2])).digest)"
    )
    registry = str(tmp_path / "registry")
    command = [sys.executable, "-c", code, registry, str(tmp_path / "folder")]
    digest = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert collect_garbage("14d", False, registry) == 0  # it is within the grace
    assert collect_garbage("0s", True, registry) == 1000
    assert Registry(Path(registry)).get(digest).digest == digest
    assert collect_garbage("0s", False, registry) == 1000
    with pytest.raises(NotFoundError):
        Registry(Path(registry)).get(digest)


@pytest.mark.parametrize(("gates", "code", "name"), [(["kld<=1"], 3, "Gated"), (["size_bytes<=1"], 3, "Gated")])
def test_run_tells_by_its_exit_code_that_a_gate_refused(
    swept: Any, registry: str, gates: list[str], code: int, name: str
) -> None:
    from flows.configuration import Deployment
    from flows.run_here import exit_code, run_here

    parameters = {"version": _version(registry), "repo": "alice/small", "gates": gates, "registry": registry}
    entry = {"name": "release", "entrypoint": "flows.publish.publish", "parameters": parameters}
    state = run_here(Deployment.model_validate(entry))
    assert (exit_code(state), state.name) == (code, name)


def test_exit_codes_of_the_other_ends() -> None:
    from prefect.states import Completed, Crashed, Failed

    from flows.run_here import exit_code
    from flows.states import skipped

    assert [exit_code(state) for state in (Completed(), skipped("no news"), Failed(), Crashed())] == [0, 0, 1, 1]


def test_run_command_runs_a_deployment_and_prints_its_end(server: str, tmp_path: Path) -> None:
    entry = {
        "name": "tidy",
        "entrypoint": "flows.collect_garbage.collect_garbage",
        "parameters": {"dry_run": True, "registry": str(tmp_path / "registry")},
    }
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"deployments": [entry]}), encoding="utf-8")
    command = [sys.executable, "-m", "flows", "run", "tidy", "--file", str(tmp_path / "prefect.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tidy: Completed")
    missing = subprocess.run([*command[:4], "other", *command[5:]], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert "There is no deployment 'other'. The file has tidy." in missing.stderr
