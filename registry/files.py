"""The files of a folder that is to be added."""

import os
from pathlib import Path
from typing import NoReturn

from registry.errors import RegistryError
from registry.paths import check_distinct, checked_path
from registry.store import disk_errors


def files_below(folder: Path) -> list[str]:
    """Relative posix paths of all files, sorted.

    Raises:
        RegistryError: the folder is missing or empty, or holds a link, a special file or a folder that cannot be read.
        UnsafePathError: a name that not every system can hold, or two that are one on some system.
    """
    if not folder.is_dir():
        raise RegistryError(f"{folder} is not a folder, so that there is nothing to add to the registry.")
    found = []
    with disk_errors(folder):
        for here, folders, names in os.walk(folder, onerror=_raise):
            for path in (Path(here, name) for name in (*folders, *names)):
                relative = checked_path(path.relative_to(folder).as_posix())
                if path.is_symlink() or not (path.is_file() or path.is_dir()):
                    raise RegistryError(
                        f"{path} is a link or a special file. The registry keeps plain files: replace it by a copy."
                    )
                if path.is_file():
                    found.append(relative)
    if not found:
        raise RegistryError(f"{folder} holds no file, so that there is nothing to add to the registry.")
    check_distinct(found)
    return sorted(found)


def _raise(error: OSError) -> NoReturn:
    raise error
