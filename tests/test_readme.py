"""Every command in the README is run, on the tiny model in place of `demo` and a Hub on the loopback interface."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.keys import write_keys
from tests.pipeline.small import TEXTS
from tests.registry.hub_server import WRITE_TOKEN, HubServer
from tests.warm import WarmPython, warm_python

ROOT = Path(__file__).parent.parent
SMALLER = "--num-samples 4 --seq-len 32 --eval-windows 2 --eval-seq-len 32 --cost-rows 8"
FEWER = "--candidate trellis2 --candidate trellis4 --rank 2"
# What makes a command small enough for a test, by its first two words.
EXTRA = {
    "compress": f"{SMALLER} {FEWER} {shlex.join(TEXTS)} --recover-samples 4 --recover-steps 4",
    "plan": f"{SMALLER} {FEWER}",
    "evaluate": "--num-windows 2 --seq-len 32",
    "generate": "--max-new-tokens 2",
    "finetune": "--steps 2 --most-rows 8 --batch-size 1 --seq-len 1024",
}


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def test_there_are_commands() -> None:
    assert len(commands()) > 8
    assert {command.split()[0] for command in commands()} <= {"make", "bitsmith", "python", "pip", "hf"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory):
    home = tmp_path_factory.mktemp("readme")
    write_keys(home, "key", ec.SECP256R1())
    with HubServer() as hub:
        yield os.environ | {
            "BITSMITH_HOME": str(home / "home"),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
            "WORK": str(home),
            "PYTHONPATH": str(ROOT),
        }


def _run(command: str, python: WarmPython, model: Path) -> subprocess.CompletedProcess[str]:
    words = [str(model) if word == "demo" else re.sub("^user/", "alice/", word) for word in shlex.split(command)]
    if words[0] == "python":
        assert words[1] == "-m"
        module, *words = words[2:]
    else:
        module, words = {"bitsmith": "pipeline", "hf": "huggingface_hub.cli.hf"}[words[0]], words[1:]
    verb = "compress" if module == "flows.compress" else words[0]
    return python.run(module, [*words, *shlex.split(EXTRA.get(verb, ""))])


@pytest.fixture
def python(environment: dict[str, str], tmp_path: Path) -> Iterator[WarmPython]:
    with warm_python(environment, Path(environment["WORK"]), tmp_path) as warm:
        yield warm


def test_every_command_runs_in_order(python: WarmPython, tiny_model_dir: Path) -> None:
    """One test, because each command works on what those before it made."""
    for command in commands():
        if command.startswith("make "):
            dry = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, check=False)
            assert dry.returncode == 0, command
        elif not command.startswith("pip "):
            done = _run(command, python, tiny_model_dir)
            assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("number", range(2))
def test_the_python_examples_run(number: int, environment: dict[str, str]) -> None:
    """After the commands: they load the folders that those made."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(examples) == 2
    example = examples[number]
    done = subprocess.run(
        [sys.executable, "-c", example],
        capture_output=True,
        text=True,
        env=environment,
        cwd=environment["WORK"],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert bool(done.stdout.strip()) == ("print(" in example)
