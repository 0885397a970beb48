"""transformers, made less talkative: no chatter or progress bars of its own, and errors in one line.

What its warnings would say is either checked here (missing tensors, shapes) or of no use to a reader who
sees bitsmith's own display. Errors still come as exceptions.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Log errors only, and draw no bars, until the block ends; the former settings come back."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error of many paragraphs says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
