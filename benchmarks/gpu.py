"""All that is to be measured on a GPU, in one run, into a file with the card's name and the day.

    python -m benchmarks.gpu [--commit] [--only kernels] [--out FOLDER]      FOLDER/<card>-<day>.md; about half an hour
    python -m benchmarks.gpu --dry-run        on any machine, tiny shapes, no file: does it all run?

It has the tables of `benchmarks.kernels`, `benchmarks.gpu_model` and `benchmarks.gpu_finetune`, each in a process of
its own, so that one which fails does not cost the others; the file has each as soon as it ends.
"""

import argparse
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from benchmarks.gpu_model import NO_GPU

MODULES = ("kernels", "gpu_model", "gpu_finetune")
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--commit", action="store_true", help="commit the file")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args(arguments)
    if not asked.dry_run and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    card = "none" if asked.dry_run else _slug(torch.cuda.get_device_name())
    target, text, failed = asked.out / f"{card}-{date.today()}.md", "", []
    for module in asked.only:
        status, printed = _printed(module, ["--dry-run", "--layers", "1"] if asked.dry_run else [])
        failed += [module] * bool(status)
        text += printed
        if not asked.dry_run:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    if not asked.dry_run:
        print(f"\n{target}")
        if asked.commit:
            _commit(target)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; what they said stands above")


def _printed(module: str, flags: list[str]) -> tuple[int, str]:
    """Exit status, and what the module prints, which is shown meanwhile."""
    if module == "kernels":
        flags = flags[:1]  # it has no layers
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return running.returncode, "".join(lines)


def _slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def _commit(target: Path) -> None:
    subprocess.run(["git", "add", str(target)], cwd=target.parent, check=True)
    message = f"Measure on {torch.cuda.get_device_name()}"
    subprocess.run(["git", "commit", "--quiet", "-m", message, "--", str(target)], cwd=target.parent, check=True)


if __name__ == "__main__":
    main()
