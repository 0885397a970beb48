"""What can go wrong on the way to the Hub, whatever HTTP library huggingface_hub uses underneath."""


def hub_failures(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What a Hub raises that is away, switched off or breaks off, and `more`: for an `except` clause."""
    # httpx in huggingface_hub 1, httpx2 in 2: its own errors module knows which
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    return (HTTPError, OfflineModeIsEnabled, OSError, *more)
