"""Where a registry keeps its index and its blobs: `registry.toml` in its folder, so that no two processes can disagree.

    database = "postgresql://user@host/name"    # a password belongs into ~/.pgpass or PGPASSWORD
    store = "s3://bucket/prefix"                # credentials belong into the environment or ~/.aws

Without the file, or without a line, the index is SQLite in `index.sqlite` beside it, and the blobs are in `blobs`.
"""

import json
import socket
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from registry.errors import RegistryError
from registry.store import disk_errors, write_atomically

FILE = "registry.toml"
HERE = ("", "localhost", "127.0.0.1", "::1")
NOT_SHOWN = ("user", "password", "sslpassword")  # of what stands behind the question mark of a database's URL


@dataclass(frozen=True)
class RegistrySettings:
    """See the module's docstring; None is the default."""

    database: str | None = None
    store: str | None = None

    @staticmethod
    def read(root: Path) -> "RegistrySettings":
        """Of the registry in the folder `root`.

        Raises:
            RegistryError: the file cannot be read, or has a line that is not known.
        """
        path = root / FILE
        try:
            with disk_errors(path):
                text = path.read_text(encoding="utf-8") if path.exists() else ""
            found = RegistrySettings(**tomllib.loads(text))
            if not all(value is None or isinstance(value, str) for value in asdict(found).values()):
                raise TypeError("a value is no text")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError) as error:
            raise RegistryError(
                f"{path} cannot be read ({error}). Expected at most the lines "
                '`database = "postgresql://user@host/name"` and `store = "s3://bucket/prefix"`.'
            ) from error
        return found

    def index_name(self, root: Path) -> str:
        """Of the registry in `root`: the same for all hosts that share an index, another for each index; no secrets."""
        if self.database is None:
            return f"index.sqlite in {root.resolve()} on {socket.gethostname()}"
        parts = urlsplit(self.database)
        query = urlencode([each for each in parse_qsl(parts.query, keep_blank_values=True) if each[0] not in NOT_SHOWN])
        name = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl()
        host = dict(parse_qsl(parts.query)).get("host") or parts.hostname or ""
        is_local = parts.scheme.startswith("sqlite") or host.startswith("/") or host in HERE
        return f"{name} on {socket.gethostname()}" if is_local else name

    def write(self, root: Path) -> None:
        """For the registry in the folder `root`."""
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in asdict(self).items() if value is not None]
        write_atomically(root / FILE, "".join(lines))
