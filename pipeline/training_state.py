"""A training between two steps: everything that the next step depends on, kept on disk over kills.

<path>, a safetensors file
    master/<name>, mean/<name>, square/<name>   float32, the trained values and AdamW's two moments
    best/<name>                                 float32, the values of the best measurement, if better than the start
    metadata: {"state": JSON with step, losses, checks and what the training was started with}
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.atomic import replace_file
from pipeline.recipe import refuse_changes

SAVE_SHARE = 0.05  # of the time may go into saving


@dataclass(frozen=True)
class Check:
    """One measurement on what is held out, in nats a token.

    `train_loss` is the mean loss of the steps since the last one; None before the first.
    """

    step: int
    held_out_loss: float
    train_loss: float | None


@dataclass
class TrainingState:
    """See the module's docstring. `started_with` is plain JSON: settings, hashes of tokens and starting values."""

    path: Path
    started_with: dict[str, Any]
    master: dict[str, Tensor]
    mean: dict[str, Tensor]
    square: dict[str, Tensor]
    best: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    losses: list[float] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    _saved_at: float = field(default_factory=time.monotonic)
    _save_seconds: float = 0.0

    @staticmethod
    def begin(
        path: Path, started_with: dict[str, Any], start: dict[str, Tensor], device: torch.device
    ) -> "TrainingState":
        """Before the first step, or where an earlier call was when it last saved to `path`.

        Args:
            device: where values and moments lie, 12 bytes for each trained number.
        Raises:
            RecipeChangedError: that call was started with something else; names the field.
        """
        if path.exists():
            return TrainingState._read(path, started_with, device)
        master = {name: value.detach().to(device, torch.float32, copy=True) for name, value in start.items()}
        mean, square = ({name: torch.zeros_like(value) for name, value in master.items()} for _ in range(2))
        return TrainingState(path, started_with, master, mean, square)

    @property
    def checks_without_gain(self) -> int:
        """Measurements since the best one."""
        found = [check.held_out_loss for check in self.checks]
        return len(found) - 1 - found.index(min(found))

    def save_if_due(self) -> None:
        if time.monotonic() - self._saved_at > self._save_seconds / SAVE_SHARE:
            self.save()

    def save(self) -> None:
        started = time.monotonic()
        parts = {"master": self.master, "mean": self.mean, "square": self.square, "best": self.best}
        tensors = {f"{part}/{name}": value.contiguous() for part, held in parts.items() for name, value in held.items()}
        facts = {
            "started_with": self.started_with,
            "step": self.step,
            "losses": self.losses,
            "checks": [asdict(check) for check in self.checks],
        }
        replace_file(self.path, lambda path: save_file(tensors, path, metadata={"state": json.dumps(facts)}))
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - started

    @staticmethod
    def _read(path: Path, started_with: dict[str, Any], device: torch.device) -> "TrainingState":
        parts: dict[str, dict[str, Tensor]] = {"master": {}, "mean": {}, "square": {}, "best": {}}
        with safe_open(path, framework="pt", device=str(device)) as stored:
            facts = json.loads(stored.metadata()["state"])
            for key in stored.keys():  # noqa: SIM118
                part, _, name = key.partition("/")
                parts[part][name] = stored.get_tensor(key)
        advice = "Go on with those settings, or start in an empty folder."
        refuse_changes(facts["started_with"], started_with, f"The unfinished training in {path.parent}", advice)
        return TrainingState(
            path,
            started_with,
            parts["master"],
            parts["mean"],
            parts["square"],
            parts["best"],
            step=facts["step"],
            losses=facts["losses"],
            checks=[Check(*check.values()) for check in facts["checks"]],
        )
