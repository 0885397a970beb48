"""What may be spent, and what the words mean.

2.75bpw            bits per parameter: every stored bit of the compressed matrices (codes, scales,
                   second-level scales, low-rank factors) over their number of parameters
180MB, 4.2GiB      bytes of the finished folder: weights with embeddings, norms and head, configuration,
                   tokenizer, plan (the report is not part of the model and does not count)
40%                the same, as a share of the original model's weight files
2.5bpw,180MB,40%   several: a checkpoint for each
"""

import re
from dataclasses import dataclass, replace

from pipeline.errors import BudgetError

UNITS_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40
}  # fmt: skip
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+|%)\s*")


@dataclass(frozen=True)
class Budget:
    """A parsed budget; exactly one of the two is set.

    Attributes:
        text: as the user wrote it.
        bits_per_param: for the compressed matrices.
        share: of the original's weight bytes, where `size_bytes` is still to be derived from it.
        size_bytes: for the finished folder.
    """

    text: str
    bits_per_param: float | None = None
    size_bytes: int | None = None
    share: float | None = None

    @staticmethod
    def parse(text: str) -> "Budget":
        """Read a budget.

        Raises:
            BudgetError: malformed or not positive.
        """
        match = _NUMBER.fullmatch(text)
        unit = match[2].upper() if match else ""
        value = float(match[1]) if match else 0.0
        if value > 0 and unit == "BPW":
            return Budget(text, bits_per_param=value)
        if value > 0 and unit == "%":
            return Budget(text, share=value / 100)
        if value > 0 and unit in UNITS_BYTES:
            return Budget(text, size_bytes=int(value * UNITS_BYTES[unit]))
        raise BudgetError(
            f"{text!r} is not a budget. Expected a positive number and a unit: bits per parameter (2.75bpw), the "
            "size of the finished folder (180MB, 4.2GiB), or a share of the original's weights (40%)."
        )

    @property
    def label(self) -> str:
        """The budget in a folder's or a version's name, as the user wrote it: `2.5bpw`, `180MB`, `40pct`."""
        return "".join(self.text.split()).replace("%", "pct")

    def limit_bytes(self, original_bytes: int) -> int | None:
        """Bytes that the finished folder may take; None for a budget in bits per parameter."""
        return int(self.share * original_bytes) if self.share is not None else self.size_bytes


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """Read one budget or a comma-separated list, in the order given.

    Raises:
        BudgetError: one is malformed, or two of them mean the same.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and "" in parts:
        raise BudgetError(
            f"The list of budgets {text!r} has an empty place. Expected budgets with one comma between two of them: "
            "2.5bpw,180MB,40%."
        )
    budgets = tuple(Budget.parse(part) for part in parts)
    for position, budget in enumerate(budgets):
        for earlier in budgets[:position]:
            if replace(budget, text="") == replace(earlier, text=""):
                raise BudgetError(
                    f"The list of budgets {text!r} has the same budget twice, as {earlier.text!r} and as "
                    f"{budget.text!r}. Name each budget once."
                )
    return budgets


def human_bytes(size_bytes: float) -> str:
    """1234567 -> "1.23 MB"; decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} TB"
