"""A recipe small enough to run whole in seconds."""

from typing import Any

SMALL: dict[str, Any] = {
    "budget": "4.5bpw",
    "rank": 2,
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
