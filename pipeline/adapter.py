"""A checkpoint with an adapter of `finetune`: loaded, and checked to say what the trained network said."""

from pathlib import Path

import torch
from jaxtyping import Float, Int64
from peft import PeftModel
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.memory import is_shortage
from pipeline.packed import load_packed
from quantizers.adapter import attach_adapter

# of the largest logit: the same products, summed in another order and, of trained factors, another sum of products
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}


def load_tuned(
    checkpoint: Path,
    adapter: Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> PeftModel:
    """The packed checkpoint with the adapter on it; `dtype` as of `load_packed`.

    Raises:
        CheckpointError: one of them is damaged, or the adapter belongs to another base.
    """
    network = load_packed(checkpoint, device, dtype, trust_remote_code=trust_remote_code)
    try:
        return attach_adapter(network, adapter).eval()
    except (ValueError, RuntimeError, OSError) as error:
        if is_shortage(error):
            raise
        raise CheckpointError(f"{adapter} does not go on {checkpoint}: {error}.") from error


def check_adapter(
    checkpoint: Path,
    adapter: Path,
    tokens: Int64[Tensor, " tokens"],
    logits: Float[Tensor, "tokens vocab"],
    *,
    trust_remote_code: bool = False,
) -> None:
    """Load both anew and compare what they say to `tokens` with what the trained network said.

    Raises:
        CheckpointError: they differ.
    """
    tuned = load_tuned(checkpoint, adapter, str(logits.device), trust_remote_code=trust_remote_code)
    with torch.no_grad():
        found = tuned(input_ids=tokens[None].to(logits.device), use_cache=False).logits[0]
    largest, difference = logits.abs().max().item(), (found.float() - logits.float()).abs().max().item()
    most = TOLERANCES[found.dtype] * largest
    if not difference <= most:
        raise CheckpointError(
            f"The adapter in {adapter}, loaded again, gives logits that differ by {difference:.3g} from those of the "
            f"trained network, where {most:.3g} is the most that rounding explains. This is a fault of "
            "bitsmith; please report it. Nothing was put in place."
        )
