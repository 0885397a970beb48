"""What every training of small parts has to be told, checked once."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Compute = Literal["bfloat16", "float32"]


class TrainingSettings(BaseModel):
    """See the fields; pydantic's ValidationError names the one that is out of range."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(100, ge=1, description="of the optimizer, at most")
    learning_rate: float = Field(1e-3, gt=0, description="at its height, of AdamW without decay")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="of the steps, linear; the rest falls as a half cosine")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the gradient over all that is trained")
    held_out_share: float = Field(0.125, gt=0, lt=1, description="of the items, the last ones, never trained on")
    most_held_out: int = Field(16, ge=1, description="and no more items than these")
    check_every: int = Field(30, ge=1, description="steps between measurements on what is held out")
    compute: Compute = Field("bfloat16", description="of the matrix products, by autocast")
    seed: int = Field(0, ge=0, lt=2**42, description="of the order of the items")

    def num_held_out(self, num_items: int) -> int:
        """Items that are never trained on: the share, at least one, and one less than all at most."""
        return min(max(1, round(self.held_out_share * num_items)), self.most_held_out, num_items - 1)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        warmup = math.ceil(self.warmup_share * self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (self.steps - warmup)))
