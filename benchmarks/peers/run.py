"""Run the peers one after the other, each in a process of its own; a peer that fails becomes a row with its error.

    python -m benchmarks.peers.run MODEL_FOLDER TOKENS.safetensors OUT_FOLDER [--only hqq nf4-4-g64]

OUT_FOLDER gets, for each row, LABEL.safetensors (see result.py) and LABEL.log with everything the peer printed. A row
whose file is there, made from the same model and tokens, is not run again. `run` is the same from Python.
"""

import argparse
import os
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.result import Facts, inputs_digest, load_facts
from benchmarks.peers.rows import ROOT, ROWS, Row


@dataclass(frozen=True)
class Outcome:
    """A finished row: where its weights are and the facts, or the error that the peer ended with."""

    row: Row
    weights: Path | None
    facts: Facts | None
    error: str | None


def run(model: Path, tokens: Path, out: Path, rows: Iterable[Row] = ROWS) -> Iterator[Outcome]:
    """Yield one outcome a row, in order, as each is done.

    Args:
        model: folder with safetensors and configuration.
        tokens: safetensors file with `tokens`, int64 [windows, tokens], the calibration of every peer that takes data.
        out: folder for weights and logs; made if it is not there.
    """
    model, tokens, out = model.resolve(), tokens.resolve(), out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    inputs = inputs_digest(model, tokens)
    for row in rows:
        weights = out / f"{row.label}.safetensors"
        error = None
        if not _is_done(weights, inputs):
            weights.unlink(missing_ok=True)
            error = _run_row(row, model, tokens, weights)
        yield Outcome(row, None, None, error) if error else Outcome(row, weights, load_facts(weights), None)


def _is_done(weights: Path, inputs: str) -> bool:
    return weights.exists() and load_facts(weights)["inputs"] == inputs


def _run_row(row: Row, model: Path, tokens: Path, weights: Path) -> str | None:
    """The error of the peer's process, None if it ended well."""
    command = [row.python, "-m", f"benchmarks.peers.{row.peer}", *map(str, (model, tokens, weights))]
    command += ["--bits", str(row.bits), "--group", str(row.group), "--rank", str(row.rank)]
    log = weights.with_suffix(".log")
    # a peer must not look for models or data elsewhere: all of them get the same
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            )
    except OSError as error:
        return f"{row.python} cannot be started ({error.strerror}). `make peers` sets up the peers' environments."
    if process.returncode == 0 and weights.exists():
        return None
    return _reason(log, process.returncode)


def _reason(log: Path, returncode: int) -> str:
    """The last line that names an exception, else how the process ended."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        name = line.partition(":")[0]
        if name.replace(".", "").replace("_", "").isalnum() and name.endswith(("Error", "Exception", "Interrupt")):
            return line
    if returncode < 0:
        return f"ended by signal {-returncode} (9 is usually too little memory); see {log}"
    return f"ended with exit code {returncode} and no exception; see {log}"


def print_row(outcome: Outcome) -> None:
    """One line of a Markdown table: bits per parameter, seconds, memory, or the error."""
    label = outcome.row.label
    if outcome.facts is None:
        print(f"| {label} | {outcome.error} | | | |", flush=True)
        return
    facts = outcome.facts
    print(
        f"| {label} | {facts['size_bits'] / facts['num_params']:.3f} | {facts['seconds']:.0f} | "
        f"{facts['peak_bytes'] / 1e9:.2f} | {facts['forward_error']:.1e} |",
        flush=True,
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tokens", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="PEER_OR_LABEL")
    asked = parser.parse_args()
    known = {name for row in ROWS for name in (row.peer, row.label)}
    if unknown := set(asked.only) - known:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    rows = [row for row in ROWS if not asked.only or {row.peer, row.label} & set(asked.only)]
    print("| peer | bits per parameter | seconds | peak GB | forward error |\n| --- | --: | --: | --: | --: |")
    for outcome in run(asked.model, asked.tokens, asked.out, rows):
        print_row(outcome)


if __name__ == "__main__":
    main()
