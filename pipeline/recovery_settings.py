"""What decides the result of a recovery, checked once."""

from typing import Literal

from pydantic import Field

from pipeline.training_settings import TrainingSettings

Kind = Literal["factors", "norms", "scales", "biases"]


class RecoverySettings(TrainingSettings):
    """See the fields; the items of TrainingSettings are windows of the calibration text."""

    train: tuple[Kind, ...] = Field(min_length=1, description="see pipeline/trainable.py")
    batch_windows: int = Field(2, ge=1, description="windows a step, one forward and backward pass each")
    kl_weight: float = Field(1.0, ge=0, description="of the divergence from the original")
    hidden_weight: float = Field(0.0, ge=0, description="of the relative error of what the head reads")
    ce_weight: float = Field(0.0, ge=0, description="of the next token's cross-entropy")
    num_top: int = Field(64, ge=1, description="tokens a position that are told apart in the divergence")
    patience: int = Field(3, ge=1, description="measurements without a gain after which it stops, late")
