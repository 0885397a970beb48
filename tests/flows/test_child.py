"""A child process: its results, its errors, its death."""

import logging
import os
import signal
import time
from collections.abc import Callable

import pytest

from pipeline.errors import ModelError, WorkerError


def _double(number: int, say: Callable[[str], None]) -> tuple[int, int]:
    return 2 * number, os.getpid()


def _refuse(message: str, say: Callable[[str], None]) -> None:
    raise ModelError(message)


class _UnsendableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _raise_unsendable(argument: None, say: Callable[[str], None]) -> None:
    raise _UnsendableError(1, 2)


def _die(number: int, say: Callable[[str], None]) -> None:
    say("decompose, matrix model.layers.0.mlp.up_proj.weight")
    os.kill(os.getpid(), number)


def _log(text: str, say: Callable[[str], None]) -> None:
    logging.getLogger("some.library").warning("%s", text)


def _tell_pid_and_sleep(path: str, say: Callable[[str], None]) -> None:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)


@pytest.fixture(scope="module", autouse=True)
def _no_child_is_left():
    yield
    from flows.child import close_idle

    close_idle()


def _call(work, argument):
    from flows.child import borrowed_child

    said: list[str] = []
    with borrowed_child() as child:
        return child.call(work, argument, said.append, doing="work")


def test_one_child_does_one_call_after_another_elsewhere() -> None:
    doubled, pid = _call(_double, 21)
    again, same = _call(_double, 4)
    assert (doubled, again) == (42, 8)
    assert pid == same != os.getpid()


def test_an_error_comes_back_as_it_was_raised_and_the_child_lives_on() -> None:
    _, pid = _call(_double, 1)
    with pytest.raises(ModelError, match=r"^no such model$"):
        _call(_refuse, "no such model")
    with pytest.raises(WorkerError, match="_UnsendableError: 1 and 2"):
        _call(_raise_unsendable, None)
    assert _call(_double, 1) == (2, pid)


def test_a_killed_child_is_named_with_what_it_was_doing_and_another_takes_over() -> None:
    _, pid = _call(_double, 1)
    with pytest.raises(WorkerError, match=r"Out of memory in decompose, matrix model\.layers\.0\.mlp\.up_proj\.weight"):
        _call(_die, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"process of decompose, matrix .* ended with signal SIGSEGV"):
        _call(_die, signal.SIGSEGV)
    assert _call(_double, 1)[1] != pid


def test_one_that_was_killed_between_two_calls_is_not_given() -> None:
    from flows import child

    _, pid = _call(_double, 1)
    killed = child._idle[-1]
    os.kill(pid, signal.SIGKILL)
    killed._process.join(60)
    doubled, other = _call(_double, 2)
    assert (doubled, other != pid) == (4, True)
    assert killed not in {*child._idle, *child._living}


def test_what_it_logs_is_logged_here(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="some.library"):
        _call(_log, "the disk is nearly full")
    assert ("some.library", logging.WARNING, "the disk is nearly full") in caplog.record_tuples


def test_it_ends_with_a_parent_that_is_killed(tmp_path) -> None:
    """In a process of its own: that one dies here."""
    import subprocess
    import sys

    program = (
        "import sys\nfrom flows import child\nfrom tests.flows import test_child\n"
        "if __name__ == '__main__':\n"
        "    child._context.set_forkserver_preload([])\n"  # what it knows does not matter here
        "    child.Child().call(test_child._tell_pid_and_sleep, sys.argv[1], lambda text: None, doing='work')\n"
    )
    script, told = tmp_path / "parent.py", tmp_path / "pid"
    script.write_text(program)
    parent = subprocess.Popen([sys.executable, str(script), str(told)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 120
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child = int(told.read_text())
    parent.kill()
    parent.wait()
    while os.path.exists(f"/proc/{child}"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
