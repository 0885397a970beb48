"""A console on which every string is only words: names, notes and settings may come from strangers.

`[bold]` stays `[bold]`, and what would steer the terminal, or turn the direction of the text, is shown as its escape,
such as \\x1b.
"""

import unicodedata

from rich.console import Console
from rich.text import Text

_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format, lone surrogate, line and paragraph separator


class PlainConsole(Console):
    """Rich's console, through which titles, cells, labels and messages go as `shown` words."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options) -> Text:
        """Every string that is printed comes here, alone or in a table."""
        return super().render_str(shown(text), **options)


def shown(text: str) -> str:
    """`text`, with each character that would steer a terminal as its escape; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" or not _steers(char) else _escape(char) for char in text)


def _steers(char: str) -> bool:
    return unicodedata.category(char) in _STEERING


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
