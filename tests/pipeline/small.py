"""A recipe small enough to run whole in seconds, and the audit without a fresh interpreter's start."""

from typing import Any

SMALL: dict[str, Any] = {
    "budget": "4.5bpw",
    "ranks": (2,),
    "num_samples": 4,
    "seq_len": 32,
    "cost_rows": 8,
    "eval_windows": 2,
    "eval_seq_len": 32,
    "candidates": ("lloyd2-g32-s4", "lloyd3-g32-s4", "lloyd4-g32-s6"),
}
FLAGS = [
    *("--budget", "4.5bpw", "--rank", "2", "--num-samples", "4", "--seq-len", "32", "--eval-windows", "2"),
    *("--eval-seq-len", "32", "--candidate", "lloyd2-g32-s4", "--candidate", "lloyd3-g32-s4"),
    *("--candidate", "lloyd4-g32-s6"),
]


def audit_in_this_process() -> None:
    """For a process that does nothing else; a test takes the fixture `quick_audit`."""
    from pipeline import audit

    audit.logits_in_fresh_process = lambda folder: audit.fixed_logits(audit.load_checked(folder))
