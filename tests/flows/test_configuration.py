"""prefect.yaml: what a wrong one answers, without a server; and the example, which is right."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RECIPE = {"model": "alice/base", "budget": "3bpw"}


def _watch(**changes: Any) -> dict[str, Any]:
    """An entry that is right, but for the changes."""
    parameters = {"recipe": RECIPE, "out": "out", "gates": ["kld<=0.05"], "repo": "alice/small", "alias": "production"}
    entry = {"name": "nightly", "entrypoint": "flows.watch.watch", "parameters": parameters}
    entry["schedule"] = {"cron": "0 2 * * *", "timezone": "Europe/Berlin"}
    return entry | changes


def _with(**parameters: Any) -> dict[str, Any]:
    entry = _watch()
    return entry | {"parameters": entry["parameters"] | parameters}


def _evaluation(**parameters: Any) -> dict[str, Any]:
    return {"name": "e", "entrypoint": "flows.evaluate.evaluate", "parameters": {"what": "small"} | parameters}


def _sweep(**parameters: Any) -> dict[str, Any]:
    given = {"models": ["a/base"], "recipes": {"r": {}}, "budgets": ["3bpw"], "out": "out"} | parameters
    return {"name": "s", "entrypoint": "flows.sweep.sweep", "parameters": given}


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no cron": ([_watch(schedule={"cron": "every night"})], r"nightly: 'every night' is no cron. Expected five fields"),
    "seconds in a cron": ([_watch(schedule={"cron": "0 0 2 * * *"})], "'0 0 2 . . .' is no cron. Expected five fields"),
    "a day that never comes": ([_watch(schedule={"cron": "0 2 31 2 *"})], "no day fits the schedule '0 2 31 2 .'"),
    "a rule that has ended": (
        [_watch(schedule={"rrule": "FREQ=WEEKLY;BYDAY=MO;UNTIL=20200101T000000Z"})],
        "no day fits the schedule 'FREQ=",
    ),
    "no runs at once": ([_watch(concurrency_limit=0)], "nightly.concurrency_limit.*greater than or equal to 1"),
    "a slash in a name": ([_watch(name="night/ly")], "night/ly.name: String should match"),
    "a blank for a name": ([_watch(name=" ")], "name: String should match"),
    "a list for a preset": ([_with(recipe=RECIPE | {"preset": ["best"]})], "There is no preset"),
    "one name for two": (
        [_watch(), _with(out="/elsewhere/out", recipe=RECIPE | {"seed": 1}) | {"name": "weekly"}],
        "Deployments nightly and weekly both make versions of out, by different recipes",
    ),
    "no budgets": ([_with(budgets=[])], "nightly: budgets is an empty list"),
    "no folder": ([_with(out="")], "nightly: out is empty"),
    "no model in the recipe": ([_with(recipe={"budget": "3bpw"})], r"model: Field required\. "),
    "one name for two schedules": (
        [_watch(schedule={"cron": "0 2 * * *", "parameters": {"recipe": RECIPE | {"seed": 1}}})],
        "Schedules of nightly both make versions of out, by different recipes",
    ),
    "no device": ([_with(device="gpu")], "'gpu' is no device. Expected cpu, cuda"),
    "no Dask cluster": ([_with(runner="dask:foo")], "'dask:foo' is no task runner"),
    "no Ray client": ([_with(runner="ray:head:10001")], "'ray:head:10001' is no task runner"),
    "no windows": ([_evaluation(num_windows=-1)], "num_windows is -1. Expected 1 or more"),
    "no tokens": ([_evaluation(seq_len=1)], "seq_len is 1. Expected 2 or more"),
    "no version": (
        [{"name": "p", "entrypoint": "flows.publish.publish", "parameters": {"version": "a:b", "repo": "alice/small"}}],
        "p: 'a:b' has no valid version",
    ),
    "models of one name": ([_sweep(models=["a/base", "c/base"])], "Several of the models would be called base-r"),
    "a model in a sweep's recipe": ([_sweep(recipes={"r": {"model": "a/base"}})], "The recipe r names a model"),
    "no models": ([_sweep(models=[])], "There is nothing to do"),
    "no interval": ([_watch(schedule={"interval": 0})], "nightly: 0.0 is no interval"),
    "no anchor": (
        [_watch(schedule={"interval": 3600, "anchor_date": "soon"})],
        r"deployment nightly\.schedule\.anchor_date: Input should be a valid datetime",
    ),
    "anchor of a cron": (
        [_watch(schedule={"cron": "0 2 * * *", "anchor_date": "2026-01-01"})],
        "nightly: anchor_date belongs to a schedule with interval, and this one has cron",
    ),
    "days of an interval": (
        [_watch(schedule={"interval": 3600, "day_or": False})],
        "nightly: day_or belongs to a schedule with cron, and this one has interval",
    ),
    "no time zone": (
        [_watch(schedule={"cron": "0 2 * * *", "timezone": "Europe/Berlim"})],
        "nightly: there is no time zone 'Europe/Berlim'",
    ),
    "two schedules in one": (
        [_watch(schedule={"cron": "0 2 * * *", "interval": 60})],
        "one of cron, interval and rrule, and this one has cron and interval",
    ),
    "unknown key": ([_watch(scheduel={})], "deployment nightly.scheduel: Extra inputs are not permitted"),
    "environment as a list": (
        [_watch(work_pool={"job_variables": {"env": ["A=B"]}})],
        r"deployment nightly\.work_pool\.job_variables\.env: Input should be a valid dictionary",
    ),
    "number in the environment": (
        [_watch(work_pool={"job_variables": {"env": {"OMP_NUM_THREADS": 1}}})],
        r"job_variables\.env\.OMP_NUM_THREADS: Input should be a valid string",
    ),
    "no flow": ([_watch(entrypoint="flows.watch.wach")], "nightly: 'flows.watch.wach' is no flow of this package"),
    "other code": ([_watch(entrypoint="mine.py:mine")], "is no flow of this package"),
    "two of a name": ([_watch(), _watch()], "several deployments called nightly"),
    "unknown parameter": ([_with(gate=["kld<=1"])], "the flow watch has no parameter gate"),
    "missing parameter": ([_watch(parameters={"recipe": RECIPE})], "the flow watch needs out"),
    "wrong type": ([_with(gates="kld<=1")], "nightly: .*gates"),
    "unknown recipe key": ([_with(recipe=RECIPE | {"bugdet": "3bpw"})], "nightly: The recipe has 1 wrong.*bugdet"),
    "unknown preset": ([_with(recipe=RECIPE | {"preset": "bset"})], "nightly: There is no preset 'bset'"),
    "unknown quantizer": ([_with(recipe=RECIPE | {"candidates": ["nf9"]})], "nightly: 'nf9' cannot be offered"),
    "no budget": ([_with(budgets=["3bpx"])], "nightly: .*3bpx"),
    "same budget twice": ([_with(budgets=["3bpw", "3.0bpw"], layout="branches")], "nightly: .*twice"),
    "unknown runner": ([_with(runner="slurm")], "nightly: 'slurm' is no task runner"),
    "no gate": ([_with(gates=["kld=0.05"])], "nightly: 'kld=0.05' is not a requirement"),
    "unknown metric": ([_with(gates=["bleu>=30"])], "nightly: 'bleu>=30' is not a requirement.*The figures are kld"),
    "unmeasured metric": (
        [_with(recipe=RECIPE | {"eval_windows": 0})],
        "gate kld<=0.05 asks for kld, and the recipe's evaluation measures nothing",
    ),
    "no repository": ([_with(repo="alice")], "'alice' is no repository"),
    "budgets on one branch": ([_with(budgets=["3bpw", "4bpw"])], "Set layout to branches"),
    "reserved alias": ([_with(alias="latest")], "'latest' always names"),
    "wrong schedule parameter": (
        [_watch(schedule={"cron": "0 2 * * *", "parameters": {"gates": ["kld"]}})],
        "'kld' is not a requirement",
    ),
    "no span": (
        [{"name": "gc", "entrypoint": "flows.collect_garbage.collect_garbage", "parameters": {"grace": "soon"}}],
        "gc: 'soon' is not a time",
    ),
    "sweep's recipe": (
        [
            {
                "name": "all",
                "entrypoint": "flows.sweep.sweep",
                "parameters": {
                    "models": ["a/b"],
                    "recipes": {"good": {}, "bad": {"seeed": 1}},
                    "budgets": ["3bpw"],
                    "out": "out",
                },
            }
        ],
        "all: The recipe has 1 wrong.*seeed",
    ),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def to_file(content: Any) -> Path:
        path = tmp_path / "prefect.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return to_file


@pytest.mark.parametrize("case", WRONG)
def test_wrong_entries_are_told_by_name(write: Callable[[Any], Path], case: str) -> None:
    from flows.configuration import read_configuration
    from flows.errors import DeployError

    entries, expected = WRONG[case]
    with pytest.raises(DeployError, match=expected) as raised:
        read_configuration(write({"deployments": entries}))
    assert "\n" not in str(raised.value)


def test_two_deployments_of_one_recipe_may_share_a_name(write: Callable[[Any], Path]) -> None:
    from flows.configuration import read_configuration

    assert (
        len(read_configuration(write({"deployments": [_watch(), _with(gates=["kld<=1"]) | {"name": "strict"}]}))) == 2
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("deployments: [", "cannot be read as YAML"),
        ("deployments: 3", "not as expected"),
        ("deployment: []", "deployment: Extra inputs"),
        ("", "has no deployments"),
        ({"pull": [{"prefect.deployments.steps.git_clone": {}}], "deployments": [_watch()]}, "steps to build, push"),
    ],
    ids=["no YAML", "no list", "unknown key", "empty", "pull steps"],
)
def test_wrong_files_are_told(write: Callable[[Any], Path], content: Any, expected: str) -> None:
    from flows.configuration import read_configuration
    from flows.errors import DeployError

    with pytest.raises(DeployError, match=expected):
        read_configuration(write(content))


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    from flows.configuration import read_configuration
    from flows.errors import DeployError

    with pytest.raises(DeployError, match="There is no"):
        read_configuration(tmp_path / "prefect.yaml")


def test_a_right_entry_is_taken_and_late_runs_become_one(write: Callable[[Any], Path]) -> None:
    from flows.configuration import read_configuration
    from flows.deploy import runner_deployment
    from flows.version import version_tag

    (deployment,) = read_configuration(write({"deployments": [_watch(tags=["mine"])]}))
    made = runner_deployment(deployment)
    assert made.tags == ["mine", "bitsmith", version_tag()]
    assert (made.concurrency_limit, made.concurrency_options.collision_strategy) == (1, "CANCEL_NEW")
    assert (made.schedules[0].schedule.cron, made.schedules[0].schedule.timezone) == ("0 2 * * *", "Europe/Berlin")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """As much of one as is read before any work."""
    from transformers import BertConfig

    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_gates_on_what_such_a_model_does_not_have_are_refused_where_it_is_here(
    write: Callable[[Any], Path], encoder: Path, tiny_model_dir: Path
) -> None:
    """A model of the Hub is looked at by the run."""
    from flows.configuration import read_configuration
    from flows.errors import DeployError

    decoders, features = (str(tiny_model_dir), "demo", "gone/model.gguf"), "cosine>=0.9"
    wrong = [(model, features) for model in decoders] + [(str(encoder), "top1>=80"), (str(encoder), "perplexity<=30")]
    right = [(model, "top1>=80") for model in decoders] + [(str(encoder), features), ("alice/base", features)]
    for model, gate in wrong + right:
        file = write({"deployments": [_with(recipe=RECIPE | {"model": model}, gates=["kld<=1", gate])]})
        if (model, gate) in right:
            read_configuration(file)
        else:
            with pytest.raises(DeployError, match=f"nightly: The gate {gate} asks for .*, which {model} does not have"):
                read_configuration(file)


def test_a_run_refuses_such_gates_before_any_work(
    monkeypatch: pytest.MonkeyPatch, encoder: Path, tmp_path: Path
) -> None:
    from flows.release import look
    from pipeline import news, sources
    from pipeline.errors import GateError

    found = news.News(changes=("small has no version yet",), base="0" * 40, key="0" * 12)
    monkeypatch.setattr(news, "read_news", lambda *_arguments: found)
    monkeypatch.setattr(sources, "find_source", lambda *_arguments, **_options: sources.Source(encoder, "0" * 40))

    def looked(*gates: str) -> Any:
        return look.fn(RECIPE, None, str(tmp_path / "registry"), "out", "small", list(gates), None, None)

    assert looked("cosine>=0.9", "size_bytes<=1e9")["is_new"]
    with pytest.raises(GateError, match="top1, which alice/base does not have: it is an encoder"):
        looked("cosine>=0.9", "top1>=80")


def test_job_variables_are_passed_on_with_our_settings_beside_them(write: Callable[[Any], Path]) -> None:
    from flows import RUN_SETTINGS
    from flows.configuration import read_configuration
    from flows.deploy import runner_deployment

    variables = {"image": "bitsmith", "env": {"BITSMITH_HOME": "/data", "DO_NOT_TRACK": None}}
    given = _watch(name="given", work_pool={"name": "k8s", "job_variables": variables})
    with_variables, without = read_configuration(write({"deployments": [given, _watch()]}))
    expected = variables | {"env": RUN_SETTINGS | {"BITSMITH_HOME": "/data", "DO_NOT_TRACK": None}}
    assert runner_deployment(with_variables).job_variables == expected
    assert runner_deployment(without).job_variables == {"env": RUN_SETTINGS}


@pytest.mark.parametrize("anchor", ["2026-01-01", '"2026-01-01T00:00:00Z"'], ids=["a date of YAML", "a text"])
def test_an_interval_counts_from_its_anchor(write: Callable[[Any], Path], anchor: str) -> None:
    from datetime import UTC, datetime

    from flows.configuration import read_configuration
    from flows.schedules import prefect_schedule

    entry = _watch(schedule={"interval": 3600})
    text = yaml.safe_dump({"deployments": [entry]}).replace(
        "interval: 3600", f"interval: 3600\n    anchor_date: {anchor}"
    )
    (deployment,) = read_configuration(write(text))
    assert prefect_schedule("nightly", deployment.all_schedules[0]).anchor_date == datetime(2026, 1, 1, tzinfo=UTC)


def test_the_example_is_right() -> None:
    from flows.configuration import read_configuration

    deployments = read_configuration(ROOT / "prefect.yaml")
    assert {each.entrypoint.split(".")[1] for each in deployments} >= {"watch", "sweep", "collect_garbage"}


def test_the_example_is_read_by_prefect_too() -> None:
    """As `prefect deploy --all` reads it."""
    from prefect.cli.deploy._models import PrefectYamlModel

    content = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    read = PrefectYamlModel.model_validate(content)
    assert [each.name for each in read.deployments] == [each["name"] for each in content["deployments"]]
    assert read.pull == []  # else Prefect would add steps of its own


def test_check_answers_in_one_paragraph_and_exits_with_1(write: Callable[[Any], Path]) -> None:
    file = write({"deployments": [_watch(schedule={"cron": "every night"})]})
    command = [sys.executable, "-m", "flows", "deploy", "--check", "--file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Deployment nightly: 'every night' is no cron.")
    assert len(done.stderr.strip().splitlines()) == 1
