"""Foreign text inside Markdown: as words or as code, never as markup.

In a template of `markdown_template`, whatever is printed is escaped as words unless a filter made it `Markdown`.
"""

import html
import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template

MOST_CHARACTERS = 200
_SPECIAL = re.compile(r"([\\`*_\[\]|~$@]|:(?=//)|(?<=www)\.)")


class Markdown(str):
    """Text that goes into the page as it is."""

    __slots__ = ()


def one_line(value: Any) -> str:
    """What can be seen of a text, on one line."""
    return "".join(character for character in " ".join(str(value).split()) if character.isprintable())


def shortened(value: Any) -> str:
    """`one_line`, and an ellipsis beyond MOST_CHARACTERS."""
    line = one_line(value)
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1] + "…"


def words(value: Any) -> Markdown:
    """As plain words: HTML, Markdown and bare links escaped."""
    return Markdown(_SPECIAL.sub(r"\\\1", html.escape(shortened(value), quote=False)))


def code(value: Any) -> Markdown:
    """As a code span, which nothing in it can end.

    `|` becomes `¦`: Markdown readers disagree on which backslash keeps it from ending a table's cell.
    """
    content = shortened(value).replace("|", "¦") or "-"
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return Markdown(f"{fence}{space}{content}{space}{fence}")


def line(value: Any) -> Markdown:
    """As one line of a fenced block, whole; it must not start with the fence."""
    return Markdown(one_line(value))


@cache
def markdown_template(name: str, **filters: Any) -> "Template":
    """A template of this package, compiled once in a process; `filters` beside `code` and `line`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pipeline"),
        undefined=StrictUndefined,
        autoescape=False,  # that is HTML's
        finalize=lambda value: value if isinstance(value, Markdown) else words(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "line": line} | filters
    return environment.get_template(name)
