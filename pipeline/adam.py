"""Adam (Kingma and Ba, arXiv:1412.6980, Algorithm 1), its whole state in plain dictionaries that save as they are.

AdamW (arXiv:1711.05101) without weight decay is the same.
"""

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@torch.no_grad()
def adam_step(
    values: dict[str, Tensor],
    gradients: dict[str, Tensor],
    mean: dict[str, Tensor],
    square: dict[str, Tensor],
    *,
    num_before: int,
    learning_rate: float,
) -> None:
    """Move `values` and the moments in place; all float32, and equally named and shaped.

    Args:
        gradients: in any float dtype, on any device; a value without one stays where it is.
        mean: running first moments, zeros at the start.
        square: running second moments, zeros at the start.
        num_before: steps taken before this one.
    """
    bias1, bias2 = (1 - beta ** (num_before + 1) for beta in (BETA1, BETA2))
    for name, gradient in gradients.items():
        gradient = gradient.to(values[name].device, torch.float32)
        mean[name].lerp_(gradient, 1 - BETA1)
        square[name].mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        spread = (square[name] / bias2).sqrt_().add_(EPSILON)
        values[name].addcdiv_(mean[name], spread, value=-learning_rate / bias1)
