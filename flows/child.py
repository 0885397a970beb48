"""Work in a child process: what the kernel kills there leaves a parent that says what was being done.

A child does one call after another, with the parent's environment, and ends with it. What it logs is logged here, under
the Prefect run that waits for it. Children are forked from a server process that has imported everything and started no
thread (a fork of this process, with torch at work, might hang), so that the first costs seconds and the others nothing.
"""

import atexit
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from flows.failures import is_network_failure
from pipeline.errors import WorkerError

Say = Callable[[Any], None]
Work = Callable[[Any, Say], Any]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["flows.stage", "flows.quality", "pipeline.run", "pipeline.batch_worker"])
_idle: list["Child"] = []
_living: set["Child"] = set()
_lock = threading.Lock()


class Child:
    """One process. `call` from one thread at a time."""

    def __init__(self) -> None:
        self._pipe, theirs = _context.Pipe()
        # no daemon, for those may have no children
        self._process = _context.Process(target=_serve, args=(theirs, dict(os.environ)))
        self._process.start()
        theirs.close()
        _living.add(self)

    def call(self, work: Work, argument: Any, say: Say, *, doing: str) -> Any:
        """`work(argument, say)` there; `work` is a function of a module, argument and result must pickle.

        Args:
            say: told what the child says; as a text, the last of it names what was going on should the child die.
            doing: names it before the child has said anything.
        Raises:
            WorkerError: the child died.
            Exception: what `work` raised there, with a ConnectionError as its cause where a network caused it.
        """
        now: Any = doing
        try:
            self._pipe.send((work, argument))
            kind, content = self._pipe.recv()
            while kind in ("says", "logs"):
                if kind == "says":
                    now = content
                    say(content)
                else:
                    _log(content)
                kind, content = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise self._death(now) from None
        if kind == "returns":
            return content
        error, network_failure = content
        raise error from (ConnectionError(network_failure) if network_failure else None)

    def close(self) -> None:
        """End the process, whatever it does."""
        self._pipe.close()
        self._process.kill()
        self._process.join()
        _living.discard(self)

    def _death(self, doing: Any) -> WorkerError:
        self._process.join(timeout=10)
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return WorkerError(
                f"Out of memory in {doing}: the process was killed there, as the system does where memory runs out. "
                "Close other programs, use fewer workers or a larger machine, and run it again: what is finished is "
                "kept."
            )
        cause = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return WorkerError(f"The process of {doing} ended with {cause}. Run it again: what is finished is kept.")


@contextmanager
def borrowed_child() -> Iterator[Child]:
    """A child that nobody else uses meanwhile: an idle one, or a new one. One that died is not given again."""
    child = _living_idle() or Child()
    try:
        yield child
    except BaseException as error:
        if isinstance(error, Exception) and child._process.is_alive():
            _give_back(child)
        else:
            child.close()
        raise
    _give_back(child)


def _living_idle() -> Child | None:
    """Those that were killed meanwhile are closed."""
    with _lock:
        while _idle:
            child = _idle.pop()
            if child._process.is_alive():
                return child
            child.close()
    return None


def close_idle(but: int = 0) -> None:
    """End all idle children but some; they hold memory."""
    with _lock:
        children = _idle[but:]
        del _idle[but:]
    for child in children:
        child.close()


@atexit.register
def _close_all() -> None:
    """Or the end would wait for them."""
    for child in [*_living]:
        child.close()


def _give_back(child: Child) -> None:
    with _lock:
        _idle.append(child)


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    """The child's life."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender = _Sender(pipe)
    logging.getLogger().addHandler(_Forward(sender))
    logging.getLogger().setLevel(logging.INFO)
    while True:
        try:
            work, argument = pipe.recv()
        except EOFError:
            return
        try:
            sender.send("returns", work(argument, lambda text: sender.send("says", text)))
        except Exception as error:
            sender.send_error(error)


class _Sender:
    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def send(self, kind: str, content: Any) -> None:
        with self._lock:
            self._pipe.send((kind, content))

    def send_error(self, error: Exception) -> None:
        cause = repr(error.__cause__ or error)  # which pickle would drop
        network_failure = cause if is_network_failure(error) else None
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # some want more than their message to be made anew
            error = WorkerError(f"{type(error).__name__}: {error}")
        self.send("raises", (error, network_failure))


class _Forward(logging.Handler):
    def __init__(self, sender: _Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self._sender.send("logs", (record.name, record.levelno, self.format(record)))


def _log(content: tuple[str, int, str]) -> None:
    from prefect.logging import get_run_logger

    name, level, text = content
    try:
        get_run_logger().log(level, text)
    except RuntimeError:  # no run is current
        logging.getLogger(name).log(level, text)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
