"""The tasks one by one, without a server: plain JSON between them, each fit for a process of its own."""

import json
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from pipeline.errors import RecipeChangedError

pytestmark = pytest.mark.usefixtures("quick")
STEPS = (
    *(
        "prepare",
        "collect_statistics",
        "measure_costs",
        "measure_embeddings",
        "allocate",
        "decompose",
        "recover",
        "write_checkpoint",
        "evaluate",
    ),
    *("write_report", "publish", "compare_budgets", "summarize"),
)


def _another_process(content: Any) -> Any:
    """What arrives on another machine, where nothing has been opened yet."""
    from flows import job

    job._opened.clear()
    return json.loads(json.dumps(content))


def test_each_step_can_run_in_a_process_of_its_own(server: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    from flows import steps
    from registry import Registry

    unweighted = recipe | {"sensitivity": "none", "eval_windows": 0, "recover": True}
    unweighted |= {"recover_samples": 4, "recover_steps": 2}
    registry, out = str(tmp_path / "registry"), str(tmp_path / "out")
    (job,) = steps.prepare.fn(unweighted, None, registry, out, "tiny", "cpu", "threads", True)
    statistics = steps.collect_statistics.fn(_another_process(job))
    assert statistics["digest"] is None
    costs = steps.measure_costs.fn(*_another_process([job, statistics]))
    assert steps.measure_embeddings.fn(_another_process(job))["digest"] is None
    plan = steps.allocate.fn(*_another_process([job, costs, statistics]))
    quantized = steps.decompose.fn(*_another_process([job, plan, statistics]))
    matrices = steps.recover.fn(*_another_process([job, plan, quantized, statistics]))
    checkpoint = steps.write_checkpoint.fn(*_another_process([job, plan, matrices]))
    evaluation = steps.evaluate.fn(*_another_process([job, checkpoint]))
    assert evaluation["digest"] is None
    report = steps.write_report.fn(*_another_process([job, costs, plan, matrices, checkpoint, evaluation]))
    assert steps.publish.fn(*_another_process([job, checkpoint, report])) == "tiny:1"
    version = Registry(Path(registry)).version("tiny:1")
    assert (version.digest, version.report_digest) == (checkpoint["digest"], report["digest"])
    assert (Path(out) / "report" / "index.html").is_file()
    lineage = {made.digest for made in Registry(Path(registry)).lineage(version.digest).artifacts}
    assert {costs["digest"], plan["digest"], quantized["digest"], matrices["digest"]} <= lineage


def test_what_cannot_fit_is_refused_before_anything_is_written(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import steps
    from pipeline import memory_check
    from pipeline.errors import MemoryShortError

    monkeypatch.setattr(memory_check, "free_bytes", lambda device: -(2**40))
    for budgets in (None, ["4.5bpw", "5bpw"]):
        with pytest.raises(MemoryShortError, match=r"takes about .* of memory"):
            steps.prepare.fn(
                recipe, budgets, str(tmp_path / "registry"), str(tmp_path / "out"), "tiny", "cpu", "threads", True
            )
    assert not (tmp_path / "out").exists()


def test_what_a_cluster_takes_is_not_judged_here(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import job
    from flows.runner import Runner
    from pipeline import memory_check

    prepared = job.prepare_job(
        recipe, str(tmp_path / "registry"), str(tmp_path / "out"), "tiny", "cpu", "threads", True
    )
    run, checked = job._opened[job._key(prepared)], []
    monkeypatch.setattr(
        memory_check, "check_memory", lambda run, stages: checked.append([each.name for each in stages])
    )
    for runner in ("threads", "dask:tcp://scheduler:8786"):
        assert "costs" in [stage.name for stage in job.checked_forecast(run, Runner.parse(runner))]
    here, elsewhere = checked
    assert set(here) - set(elsewhere) == {"statistics", "costs", "decompose"}
    assert {"checkpoint", "evaluate"} <= set(elsewhere)


@pytest.mark.parametrize("name", STEPS)
def test_only_plain_types_cross_the_border(name: str) -> None:
    from flows import steps
    from flows.job import Done, Job, Outcome

    plain = (str, bool, type(None), dict[str, Any], list[Done], list[Job], Done, Job, Outcome)
    plain += (str | None, list[str] | None)
    for place, hint in get_type_hints(getattr(steps, name).fn).items():
        assert hint in plain, f"{place} of {name} is {hint}"


def test_every_task_is_in_the_table_above() -> None:
    from prefect import Task

    from flows import steps

    assert {name for name, value in vars(steps).items() if isinstance(value, Task)} == set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_cached_or_stored_by_prefect(name: str) -> None:
    from prefect.cache_policies import NO_CACHE

    from flows import steps

    task = getattr(steps, name)
    assert task.cache_policy == NO_CACHE
    assert task.persist_result is False
    assert task.retries == (2 if name.startswith("prepare") else 0)


def test_model_that_changes_under_way_is_refused_by_name(
    recipe: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from flows import steps

    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    unweighted = recipe | {"model": str(folder), "sensitivity": "none", "eval_windows": 0}
    (job,) = steps.prepare.fn(
        unweighted, None, str(tmp_path / "registry"), str(tmp_path / "out"), "tiny", "cpu", "threads", True
    )
    statistics = steps.collect_statistics.fn(job)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeChangedError, match="model_sha256"):
        steps.measure_costs.fn(*_another_process([job, statistics]))
