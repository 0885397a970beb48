"""Commands in processes of their own, forked from one that has imported torch already: seconds less a command."""

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class WarmPython:
    """`python -m MODULE`, many times, in one environment and folder."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process, self._folder = process, folder

    def run(self, module: str, arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        """One command, to its end."""
        files = [str(self._folder / name) for name in ("stdout", "stderr")]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([module, list(arguments), *files]), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess([module, *arguments], code, *(Path(file).read_text() for file in files))


@contextmanager
def warm_python(environment: dict[str, str], folder: Path, scratch: Path) -> Iterator[WarmPython]:
    """It, ready to run commands in `folder`; `scratch` gets what they print."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "tests.warm"]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=folder, env=environment) as process:
        yield WarmPython(process, scratch)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    from pipeline import (  # noqa: F401
        compress,
        display_sweep,
        evaluate_folder,
        generate,
        planning,
        sweep,
        version_diff,
    )
    from tests.pipeline.small import be_quick

    be_quick()
    for line in sys.stdin:
        module, arguments, out, err = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_run(module, arguments, out, err))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(module: str, arguments: list[str], out: str, err: str) -> int:
    for stream, path in ((0, os.devnull), (1, out), (2, err)):
        descriptor = os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, stream)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve()
