"""The rows: which peer at which setting, and the environment that it runs in."""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / ".venv-peers"


@dataclass(frozen=True)
class Row:
    """One peer at one setting.

    Attributes:
        peer: module of this package that runs it.
        bits: width of a code.
        group: weights that share a scale.
        rank: of the low-rank part, where the peer has one.
        environment: folder of `ENVIRONMENTS` with a Python of its own; None for the Python that is running.
    """

    peer: str
    bits: int
    group: int
    rank: int = 0
    environment: str | None = None

    @property
    def label(self) -> str:
        """Name of the row and of its files, such as `gptq-3-g64`."""
        return f"{self.peer}-{self.bits}-g{self.group}" + (f"-r{self.rank}" if self.rank else "")

    @property
    def python(self) -> str:
        """The interpreter that has this peer installed."""
        return str(ENVIRONMENTS / self.environment / "bin" / "python") if self.environment else sys.executable


ROWS = (
    Row("nf4", 4, 64),
    *(Row("hqq", bits, group) for bits in (2, 3, 4) for group in (32, 64)),
    *(Row("gptq", bits, group, environment="gptq") for bits in (2, 3, 4) for group in (32, 64, 128)),
    *(Row("auto_round", bits, 64) for bits in (2, 3, 4)),
    *(Row("loftq", bits, 64, rank=8) for bits in (2, 4)),
)
