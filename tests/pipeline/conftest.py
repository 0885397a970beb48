"""The command line and the audit in this process, so that torch is imported once for all tests."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pipeline.cli import main


@dataclass
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture
def bitsmith(monkeypatch, capsys) -> Callable[..., Answer]:
    def call(*arguments: object) -> Answer:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(sys, "argv", ["bitsmith", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return call
