"""A recipe small enough to run whole in seconds, and what makes it quicker still."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

_TEXTS = Path(__file__).parent.parent / "texts"
SMALL: dict[str, Any] = {
    "budget": "4.5bpw",
    "dataset": str(_TEXTS / "calibration.txt"),
    "eval_dataset": str(_TEXTS / "evaluation.txt"),
    "ranks": (2,),
    "num_samples": 4,
    "seq_len": 32,
    "cost_rows": 8,
    "eval_windows": 2,
    "eval_seq_len": 32,
    "candidates": ("lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s6"),
}
TEXTS = ["--dataset", SMALL["dataset"], "--eval-dataset", SMALL["eval_dataset"]]
FLAGS = [
    *("--budget", "4.5bpw", "--rank", "2", "--num-samples", "4", "--seq-len", "32", "--eval-windows", "2"),
    *("--eval-seq-len", "32", "--candidate", "lloyd2-g32-s4", "--candidate", "lloyd3-g32-s4"),
    *("--candidate", "lloyd4-g32-s6"),
    *TEXTS,
]


def be_quick(set_attribute: Callable[[object, str, Any], None] = setattr) -> None:
    """The audit without a fresh interpreter's start, short samples, no pictures, few points on the report's curve.

    For a process that does nothing else; a test takes the fixture `quick`.
    """
    from pipeline import audit, figures, quality, report

    def answer(folder: Path, **trust: bool) -> Any:
        return audit.fixed_answer(audit.load_checked(folder, **trust))

    set_attribute(audit, "answer_in_fresh_process", answer)
    set_attribute(quality, "SAMPLE_TOKENS", 4)
    set_attribute(report, "png", lambda draw, content, theme: f"{draw.__name__} on {theme.surface}".encode())
    set_attribute(figures, "NUM_CURVE_BUDGETS", 3)
