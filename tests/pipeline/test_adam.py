import pytest
import torch

from pipeline.adam import adam_step


@pytest.mark.parametrize("learning_rate", [1e-4, 1e-2])
def test_equals_torchs_adamw_without_decay(learning_rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(5, 3, generator=generator), "b": torch.randn(7, generator=generator)}
    theirs = {name: value.clone().requires_grad_() for name, value in start.items()}
    reference = torch.optim.AdamW(theirs.values(), lr=learning_rate, weight_decay=0.0)
    ours = {name: value.clone() for name, value in start.items()}
    mean, square = ({name: torch.zeros_like(value) for name, value in start.items()} for _ in range(2))
    for step in range(6):
        gradients = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
        for name, gradient in gradients.items():
            theirs[name].grad = gradient.clone()
        reference.step()
        adam_step(ours, gradients, mean, square, num_before=step, learning_rate=learning_rate)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-6, atol=1e-7)


def test_a_value_without_a_gradient_stays() -> None:
    values = {"a": torch.ones(2), "b": torch.ones(2)}
    mean, square = ({name: torch.zeros(2) for name in values} for _ in range(2))
    adam_step(values, {"a": torch.ones(2)}, mean, square, num_before=0, learning_rate=0.5)
    assert torch.equal(values["b"], torch.ones(2))
    torch.testing.assert_close(values["a"], torch.full((2,), 0.5))
