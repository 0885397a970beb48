"""What decides the result of a recovery, checked once."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["factors", "norms", "scales", "biases"]
Compute = Literal["bfloat16", "float32"]


class RecoverySettings(BaseModel):
    """See the fields; pydantic's ValidationError names the one that is out of range."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[Kind, ...] = Field(("factors", "norms"), min_length=1, description="see pipeline/trainable.py")
    steps: int = Field(100, ge=1, description="of the optimizer, at most")
    batch_windows: int = Field(2, ge=1, description="windows a step, one forward and backward pass each")
    learning_rate: float = Field(1e-3, gt=0, description="at its height, of AdamW without decay")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="of the steps, linear; the rest falls as a half cosine")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient over all that is trained")
    kl_weight: float = Field(1.0, ge=0, description="of the divergence from the original")
    hidden_weight: float = Field(0.0, ge=0, description="of the relative error of what the head reads")
    ce_weight: float = Field(0.0, ge=0, description="of the next token's cross-entropy")
    num_top: int = Field(64, ge=1, description="tokens a position that are told apart in the divergence")
    held_out_share: float = Field(0.125, gt=0, lt=1, description="of the windows, the last ones, never trained on")
    most_held_out: int = Field(16, ge=1, description="and no more windows than these")
    check_every: int = Field(30, ge=1, description="steps between measurements on the held-out windows")
    patience: int = Field(3, ge=1, description="measurements without a gain after which it stops, late")
    compute: Compute = Field("bfloat16", description="of the matrix products, by autocast")
    seed: int = Field(0, ge=0, description="of the order of the windows")

    def num_held_out(self, num_windows: int) -> int:
        """Windows that are never trained on: the share, at least one, and one less than all at most."""
        return min(max(1, round(self.held_out_share * num_windows)), self.most_held_out, num_windows - 1)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        warmup = math.ceil(self.warmup_share * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))
