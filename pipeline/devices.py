"""The device that a command runs on."""

from pipeline.errors import RecipeError


def device_of(device: str) -> str:
    """`auto` settled, and any other name tried out.

    Raises:
        RecipeError: this machine has no such device.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"Device {device!r} cannot be used: {reason}. Expected auto, cpu, cuda or cuda:N.") from None
    return device
