"""Times that people write: 14d, 12h, 30m or 0s."""

import re

from pipeline.errors import RecipeError

_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def span_seconds(text: str) -> float:
    """Raises RecipeError where `text` is no time."""
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        raise RecipeError(f"{text!r} is not a time. Expected a number and s, m, h or d, such as 14d or 0s.")
    return float(found[1]) * _SECONDS[found[2]]
