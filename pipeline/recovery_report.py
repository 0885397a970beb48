"""What a recovery did, in figures: recovery.json beside the matrices, a part of report.json and of the result."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RecoveryReport:
    """Divergences are from the original, in nats a token, over its likeliest tokens and one bucket for all others.

    Attributes:
        train: kinds of tensors that were trained, see pipeline/trainable.py.
        steps: that were taken.
        num_train_windows, num_held_out_windows: of the calibration text.
        has_gained: whether the held-out divergence fell; otherwise the checkpoint is what it would be without recovery.
        start_kl, best_kl: on the held-out windows, before the training and at its best.
        checks: (step, divergence on the held-out windows), the start first.
    """

    train: tuple[str, ...]
    steps: int
    num_train_windows: int
    num_held_out_windows: int
    has_gained: bool
    start_kl: float
    best_kl: float
    checks: tuple[tuple[int, float], ...]

    @property
    def meaning(self) -> str:
        """In words."""
        where = f"on {self.num_held_out_windows} held-out windows, after {self.steps} steps of {', '.join(self.train)}"
        if not self.has_gained:
            return f"no gain over KL divergence {self.start_kl:.4g} {where}: nothing was changed"
        return f"KL divergence {self.start_kl:.4g} -> {self.best_kl:.4g} {where}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the words."""
        return asdict(self) | {"meaning": self.meaning}

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "RecoveryReport":
        """Undo `to_json`."""
        fields = {key: stored[key] for key in RecoveryReport.__dataclass_fields__}
        checks = tuple((step, kl) for step, kl in fields.pop("checks"))
        return RecoveryReport(train=tuple(fields.pop("train")), checks=checks, **fields)
