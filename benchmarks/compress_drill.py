"""Drill of `bitsmith compress`: kill -9 at random moments, and every checkpoint has the digest of the undisturbed run.

    python -m benchmarks.compress_drill [--kills 50] [--seed 0]

A tiny model, all stages, recovery among them. A run is killed at a moment of the time that is left to it, the same
command goes on, and is killed again, until one comes through; then folder and registry are thrown away, and it starts
anew. Exits with 1 if a command failed by itself, or a digest differed.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.models import build_llama, save_model
from tests.pipeline.small import FLAGS

RECOVERY = ("--recover", "--recover-samples", "4", "--recover-steps", "4")


class Drill:
    """Runs of one command in `folder`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._draw = folder, random.Random(seed)
        self._model = save_model(build_llama(num_layers=4), folder / "model")

    def undisturbed(self) -> tuple[str, float]:
        """Digest, and seconds."""
        started = time.monotonic()
        digest = self._finished(self._start())
        return digest, time.monotonic() - started

    def killed(self, seconds: float) -> str | None:
        """Start a run and kill it within that time: None; or the digest, where it came through before."""
        process = self._start()
        try:
            process.wait(self._draw.uniform(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        return self._finished(process)

    def forget(self) -> None:
        """So that the next run starts anew."""
        for made in ("out", "home"):
            shutil.rmtree(self._folder / made)

    def _start(self) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "pipeline", "compress", str(self._model), "-o", str(self._folder / "out")]
        return subprocess.Popen(
            [*command, "--json", *map(str, FLAGS), *RECOVERY],
            env={"PATH": "", "BITSMITH_HOME": str(self._folder / "home"), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _finished(self, process: "subprocess.Popen[str]") -> str:
        output, said = process.communicate()
        if process.returncode:
            sys.exit(f"A run failed by itself with {process.returncode}:\n{said}")
        return str(json.loads(output)["digest"])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bitsmith-drill-") as folder:
        drill = Drill(Path(folder), asked.seed)
        digest, seconds = drill.undisturbed()
        drill.forget()
        print(f"undisturbed: {digest[:12]} in {seconds:.0f} s", flush=True)
        found: Counter[str] = Counter()
        num_kills = num_since = 0
        while num_kills < asked.kills or num_since:
            last = drill.killed(seconds) if num_kills < asked.kills else drill.undisturbed()[0]
            if last is None:
                num_kills, num_since = num_kills + 1, num_since + 1
                continue
            print(f"{num_kills} kills so far, {num_since} of this run: {last[:12]}", flush=True)
            found[last] += 1
            num_since = 0
            drill.forget()
    if set(found) != {digest}:
        sys.exit(f"{num_kills} kills, and digests that differ: {digest} undisturbed, {dict(found)} after kills")
    print(
        f"{num_kills} kills of compress: all {found[digest]} checkpoints that came of them have the undisturbed digest"
    )


if __name__ == "__main__":
    main()
