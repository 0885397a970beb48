"""The command line as a user meets it: exit codes, one-paragraph errors, JSON, and no heavy import for a mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from pipeline.cli import run_app
from pipeline.errors import ModelError
from tests.pipeline.small import FLAGS, TEXTS


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def own_home(home: Path, monkeypatch) -> Path:
    monkeypatch.setenv("BITSMITH_HOME", str(home / "home"))
    return home


@pytest.fixture
def compressed(own_home: Path, tiny_model_dir: Path, bitsmith) -> Path:
    out = own_home / "tiny-4.5"
    if not out.exists():
        done = bitsmith("compress", tiny_model_dir, "-o", out, *FLAGS)
        assert done.code == 0, done.err
        assert "bits per parameter" in done.out
        assert re.search(r"KL divergence.*nats/token", done.out)
        assert "Plan of the run" in done.err
    return out


def test_inspect(bitsmith, tiny_model_dir: Path) -> None:
    shown = bitsmith("inspect", tiny_model_dir)
    assert shown.code == 0
    assert "14 matrices" in shown.out
    assert "tied" in shown.out
    facts = json.loads(bitsmith("inspect", tiny_model_dir, "--json", "-q").out)
    assert len(facts["matrices"]) == 14
    assert facts["size_bytes"] > 0


def test_plan_dry_run_writes_nothing(bitsmith, tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    shown = bitsmith("plan", tiny_model_dir, "--dry-run", *FLAGS)
    assert shown.code == 0, shown.err
    assert "model.safetensors" in shown.out
    assert "Forecast" in shown.err
    assert "disk, up to" in shown.err
    assert "statistics" in shown.err
    assert not (tmp_path / "home").exists()


def test_plan_tells_machines_what_the_stages_will_take(bitsmith, tiny_model_dir: Path) -> None:
    shown = bitsmith("plan", tiny_model_dir, "--dry-run", *FLAGS, "--json", "-q")
    stages = json.loads(shown.out)["stages"]
    assert [stage["name"] for stage in stages][-3:] == ["checkpoint", "evaluate", "report"]
    assert all(stage["memory_bytes"] > 0 for stage in stages)
    writing = {stage["name"] for stage in stages if stage["disk_bytes"]}
    assert writing == {"statistics", "decompose", "checkpoint", "evaluate"}


def test_a_run_that_does_not_fit_ends_before_it_begins(
    bitsmith, tiny_model_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("BITSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pipeline.memory_check.free_bytes", lambda device: -(2**40))
    refused = bitsmith("compress", tiny_model_dir, "-o", tmp_path / "out", *FLAGS)
    assert refused.code == 1
    assert "takes about" in refused.err
    assert "Nothing was started." in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    planned = bitsmith("plan", tiny_model_dir, "--dry-run", *FLAGS)
    assert planned.code == 1  # statistics do not fit either, but it is told what they would take
    assert "Forecast" in planned.err


def test_compress_again_says_that_it_is_done(bitsmith, compressed: Path, tiny_model_dir: Path) -> None:
    again = bitsmith("compress", tiny_model_dir, "-o", compressed, *FLAGS)
    assert again.code == 0
    assert "was finished before" in again.out
    facts = json.loads(bitsmith("compress", tiny_model_dir, "-o", compressed, *FLAGS, "--json", "-q").out)
    assert facts["bits_per_param"] <= 4.5
    assert facts["was_finished"]


def test_evaluate_and_generate(bitsmith, compressed: Path, tiny_model_dir: Path) -> None:
    shown = bitsmith(
        "evaluate",
        compressed,
        "--base",
        tiny_model_dir,
        "--num-windows",
        "2",
        "--seq-len",
        "32",
        "--json",
        "-q",
    )
    facts = json.loads(shown.out)
    assert facts["num_windows"] == 2
    assert facts["kl_divergence"]["mean"] > 0
    written = bitsmith("generate", compressed, "Once upon a time", "--max-new-tokens", "3")
    assert written.code == 0, written.err
    assert written.out.startswith("Once upon a time")


def test_what_generate_cannot_do_is_one_paragraph(
    bitsmith, compressed: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    import shutil

    silent = Path(shutil.copytree(compressed, tmp_path / "silent"))
    (silent / "chat_template.jinja").unlink()
    assert bitsmith("compress", tiny_gpt2_dir, "-o", tmp_path / "gpt2", "-q", *FLAGS).code == 0
    cases = {
        (silent, "hello", "--chat"): "has no chat template. Leave --chat out",
        (tmp_path / "gpt2", "hello there", "--max-new-tokens", "99999"): r"more than the \d+ positions of this model",
        (compressed, "hello \udcff"): "is not UTF-8",
    }
    for arguments, expected in cases.items():
        answer = bitsmith("generate", *arguments)
        assert answer.code == 1, (arguments, answer.err)
        assert re.search(expected, answer.err), (arguments, answer.err)
        assert len(answer.err.strip().splitlines()) == 1, answer.err


MISTAKES = {
    "unknown model": (
        ["compress", "no/such/folder", "-b", "3bpw", "-o", "OUT"],
        "No model at no/such/folder",
    ),
    "malformed budget": (["compress", "MODEL", "-b", "3", "-o", "OUT"], "'3' is not a budget"),
    "foreign output": (
        ["compress", "MODEL", "-b", "3bpw", "-o", "FULL"],
        "not empty and was not made by bitsmith",
    ),
    "malformed override": (["compress", "MODEL", "-b", "3bpw", "-o", "OUT", "--override", "x"], "malformed"),
    "unknown preset": (["compress", "MODEL", "-b", "3bpw", "-o", "OUT", "--preset", "x"], "no preset 'x'"),
    "negative rank": (
        ["compress", "MODEL", "-b", "3bpw", "-o", "OUT", "--rank", "-1"],
        "ranks.0: .*greater than",
    ),
    "truncated shard": (["inspect", "TRUNCATED"], "model.safetensors"),
    "pickle only": (["inspect", "PICKLE"], "pickle"),
    "not compressed": (["generate", "MODEL", "x"], "is not a compressed checkpoint"),
    "nothing to evaluate": (["evaluate", "OUT", "--base", "MODEL"], "is not a compressed checkpoint"),
    "seed beyond all numbers": (
        ["compress", "MODEL", "-b", "3bpw", "-o", "OUT", "--seed", str(10**20)],
        "seed: .*less",
    ),
    "infinite rate": (
        ["compress", "MODEL", "-b", "3bpw", "-o", "OUT", "--recover-learning-rate", "inf"],
        "recover_learning_rate: .*finite",
    ),
    "home of nobody": (["inspect", "~nosuchuser/model"], "home folder of nobody"),
    "empty prompt": (["generate", "OUT", " "], "prompt is empty"),
}


@pytest.fixture(scope="module")
def bad_places(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import shutil

    place = tmp_path_factory.mktemp("bad")
    (place / "full").mkdir()
    (place / "full" / "x").write_text("x")
    shutil.copytree(tiny_model_dir, place / "truncated")
    weights = place / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (place / "pickle").mkdir()
    shutil.copy(tiny_model_dir / "config.json", place / "pickle")
    (place / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    names = {"OUT": "out", "FULL": "full", "TRUNCATED": "truncated", "PICKLE": "pickle"}
    return {"MODEL": str(tiny_model_dir)} | {key: str(place / name) for key, name in names.items()}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_end_at_once_in_one_paragraph(mistake: str, bad_places: dict[str, str], tmp_path: Path) -> None:
    arguments, expected = MISTAKES[mistake]
    arguments = [bad_places.get(argument, argument) for argument in arguments]
    # Without torch and transformers the answer comes within a second.
    script = (
        "import sys\nfrom pipeline.cli import main\ntry:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'matplotlib', 'sqlalchemy'} & sys.modules.keys()\n"
        "    print(sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.strip() == "[]"
    assert re.search(expected, done.stderr), done.stderr
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_slower_mistakes(bitsmith, tiny_model_dir: Path, tmp_path: Path) -> None:
    start = ["compress", tiny_model_dir, "-o", tmp_path / "out", "--num-samples", "4", *TEXTS]
    cases = {
        ("-b", "1bpw"): r"smallest plan takes .* at least \d",
        ("-b", "10kB"): r"Raise the budget to [\d.]+MB",
        ("-b", "3bpw", "--rank", "99"): "Rank 99 is above",
        ("-b", "3bpw", "--seq-len", "99999999"): "tokens, but one window needs",
        ("-b", "3bpw", "--candidate", "foo3"): "'foo3' cannot be offered",
        ("-b", "3bpw", "--override", "nosuch=nf4"): "matches no matrix",
        ("-b", "3bpw", "--device", "cuda:99"): "cannot be used",
        ("-b", "3bpw", "--dataset", "missing.txt"): "missing.txt",
    }
    for flags, expected in cases.items():
        answer = bitsmith(*start, *flags)
        assert answer.code == 1, (flags, answer.err)
        assert re.search(expected, answer.err), (flags, answer.err)
        assert len(answer.err.strip().splitlines()) == 1, answer.err
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["registry", "--help"], ["plan", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom pipeline.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_wrong_flags_exit_with_2(bitsmith, tiny_model_dir: Path) -> None:
    assert bitsmith("compress", tiny_model_dir, "--nosuch").code == 2
    assert bitsmith("compress", tiny_model_dir).code == 2


@pytest.fixture
def _handlers_come_back() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers_come_back")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_that_native_code_turns_into_an_error_is_a_stop(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As safetensors does when it is stopped while it makes a tensor."""
    app = typer.Typer()

    @app.command()
    def read() -> None:
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ModelError("could not determine the shape") from None

    monkeypatch.setattr(sys, "argv", ["read"])
    with pytest.raises(SystemExit) as ended:
        run_app(app)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err.startswith("Stopped. What is finished is kept")


@pytest.mark.usefixtures("_handlers_come_back")
def test_a_second_signal_does_not_break_off_what_the_first_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` signals a process, and then its group; a pool of workers must be shut down all the same."""
    done: list[str] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            done.append("shut down")

    app = typer.Typer()
    app.command()(work)
    monkeypatch.setattr(sys, "argv", ["bitsmith"])
    with pytest.raises(SystemExit) as stopped:
        run_app(app)
    assert stopped.value.code == 130
    assert done == ["shut down"]


def test_ctrl_c_in_the_terminal(tiny_model_dir: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "BITSMITH_HOME": str(tmp_path / "home"),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "compress",
        str(tiny_model_dir),
        "-o",
        str(tmp_path / "out"),
        *FLAGS,
    ]
    command[command.index("--num-samples") + 1] = "400"
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    steps = tmp_path / "home" / "registry" / "steps"
    deadline = time.monotonic() + 120
    while not list(steps.glob("*/part-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
