"""Names of files that mean the same on every system, and never anything outside of their folder."""

import re
import unicodedata
from collections.abc import Iterable

from registry.errors import UnsafePathError

_UNSAFE_CHARACTERS = re.compile(r"[\x00-\x1f\x7f\\]")
_DRIVE_LETTER = re.compile(r"[A-Za-z]:")


def checked_path(path: str) -> str:
    """`path` if it is a relative posix path that stays inside its folder on every system.

    Raises:
        UnsafePathError: absolute, with a drive letter, "..", ".", an empty part, a backslash, a control
            character, bytes that are not UTF-8, or too long for common file systems.
    """
    parts = path.split("/")
    reason = None
    if path.startswith("/") or _DRIVE_LETTER.match(path):
        reason = "it is absolute"
    elif any(part in ("", ".", "..") for part in parts):
        reason = "it has an empty part, '.' or '..'"
    elif _UNSAFE_CHARACTERS.search(path):
        reason = "it has a backslash or a control character"
    elif any("\ud800" <= character <= "\udfff" for character in path):
        reason = "it is not UTF-8"
    elif len(path.encode()) > 1024 or any(len(part.encode()) > 255 for part in parts):
        reason = "it is too long"
    if reason:
        raise UnsafePathError(
            f"The file name {path[:80]!r} is refused: {reason}. Names must be relative, with '/' between "
            "folders, and stay inside their folder. Rename the file."
        )
    return path


def check_distinct(paths: Iterable[str]) -> None:
    """Raise UnsafePathError for two paths that are one where case or the form of accents does not count, or of which
    one is a file and also the folder of the other."""
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        name = _folded(path)
        other = files.get(name) or folders.get(name)
        files[name] = path
        while other is None and "/" in name:
            name = name.rpartition("/")[0]
            other = files.get(name)
            folders.setdefault(name, path)
        if other is not None:
            raise UnsafePathError(
                f"The file names {other[:80]!r} and {path[:80]!r} are refused together: on a file system that ignores "
                "case or the form of accents they are one, or one is a file and the folder of the other. Rename one."
            )


def _folded(path: str) -> str:
    """Equal for paths that some file system takes for one: Unicode's canonical caseless match."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", path).casefold())
