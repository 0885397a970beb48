"""What decides the result of a finetuning, checked once."""

from typing import Literal

from pydantic import Field

from pipeline.training_settings import TrainingSettings

Start = Literal["factors", "zero"]


class FinetuneSettings(TrainingSettings):
    """See the fields; the items of TrainingSettings are examples of the dataset."""

    start: Start = Field(
        "factors", description="train the checkpoint's own factors where it has some, or new ones only"
    )
    rank: int = Field(16, ge=0, description="of the new factors, on every packed layer without trained ones")
    learning_rate: float = Field(2e-4, gt=0, description="at its height, of AdamW without decay")
    batch_size: int = Field(4, ge=1, description="examples a step, padded to the longest of them")
    seq_len: int = Field(512, ge=2, description="tokens of an example at most; longer ones are left out")
    most_rows: int = Field(10_000, ge=2, description="rows of the dataset that are read")
    check_every: int = Field(25, ge=1, description="steps between measurements on the held-out examples")
