"""How fast the registry takes files in and reads them again, beside the time of hashing them, in one run.

    python -m benchmarks.registry_throughput [--megabytes 300] [--files 4] [--rounds 9] [--folder .]

Every round does each of these once, in turn; the figures are medians of the rounds, and each ratio is the median of the
ratios within a round:

    sha256sum          coreutils, one process for all files
    openssl dgst       the same hashes by the processor's own instructions, where it has them: what Python uses too
    hash               the registry's own reading and hashing, without a registry
    add, copied        add_artifact: hashed, copied, on the disk (fsync), recorded
    add, moved         the same, renamed instead of copied, after the disk had the files already
    verify             every file of a version hashed again
    copy and sync      cp and sync: what the disk alone takes
"""

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from registry import Registry
from registry.store import hash_file

Seconds = dict[str, float]


def measured(work: Callable[[], object]) -> float:
    """Seconds that `work` takes, with nothing left for the disk to do from before."""
    os.sync()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def one_round(sources: Path, scratch: Path) -> Seconds:
    """Do everything once, in new folders below `scratch`."""
    files = sorted(sources.iterdir())
    registry, moving = Registry(scratch / "copied"), Registry(scratch / "moved")
    registry.versions()  # the database is made, and its library imported
    moving.versions()
    shutil.copytree(sources, scratch / "to-move")

    def publish() -> None:
        registry.publish("model", registry.add_artifact("checkpoint", sources))

    def copy_and_sync() -> None:
        subprocess.run(["cp", "--reflink=never", "-r", sources, scratch / "cp"], check=True)
        subprocess.run(["sync", *(scratch / "cp").iterdir()], check=True)

    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    return {
        "sha256sum": measured(lambda: subprocess.run(["sha256sum", *files], **quiet)),
        "openssl dgst": measured(lambda: subprocess.run(["openssl", "dgst", "-sha256", *files], **quiet)),
        "hash": measured(lambda: [hash_file(file) for file in files]),
        "add, copied": measured(publish),
        "add, moved": measured(lambda: moving.add_artifact("checkpoint", scratch / "to-move", move=True)),
        "verify": measured(lambda: registry.verify("model").raise_if_damaged()),
        "copy and sync": measured(copy_and_sync),
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="of all files")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    asked = parser.parse_args()
    rounds: list[Seconds] = []
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="bitsmith-throughput-") as folder:
        sources = Path(folder) / "sources"
        sources.mkdir()
        for number in range(asked.files):
            (sources / f"file{number}").write_bytes(os.urandom(asked.megabytes * 10**6 // asked.files))
        for number in range(asked.rounds):
            scratch = Path(folder) / f"round{number}"
            scratch.mkdir()
            rounds.append(one_round(sources, scratch))
            shutil.rmtree(scratch)
    print(
        f"{asked.megabytes} MB in {asked.files} files, median of {asked.rounds} rounds; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':16} {'seconds':>9} {'MB/s':>7} {'/ sha256sum':>12} {'/ openssl':>10}")
    for name in rounds[0]:
        seconds = statistics.median(each[name] for each in rounds)
        to_sha256sum, to_openssl = (
            statistics.median(each[name] / each[base] for each in rounds) for base in ("sha256sum", "openssl dgst")
        )
        speed = asked.megabytes / seconds
        print(f"{name:16} {seconds:9.3f} {speed:7.0f} {to_sha256sum:12.2f} {to_openssl:10.2f}")


if __name__ == "__main__":
    main()
