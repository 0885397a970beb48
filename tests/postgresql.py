"""A PostgreSQL server of the tests' own, on a Unix socket, as Debian's package installs it."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

MISSING = "no PostgreSQL server is installed (apt-get install postgresql)"


def programs() -> Path | None:
    """The folder with initdb and pg_ctl."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return installed[-1] if installed else None


@contextmanager
def server() -> Iterator[str]:
    """Start it; yields the folder of its socket. It refuses to run as root, so then it runs as `postgres`."""
    bin_folder = programs()
    assert bin_folder is not None, MISSING
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="bitsmith-pg-"))
    try:
        if as_user:
            shutil.chown(folder, "postgres")
        data, log = folder / "data", folder / "log"

        def call(*command: str) -> None:
            subprocess.run([*as_user, *command], check=True, capture_output=True, cwd="/", timeout=120)

        call(str(bin_folder / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8")
        options = f"-c listen_addresses= -c unix_socket_directories={folder} -c fsync=off -c max_connections=100"
        call(str(bin_folder / "pg_ctl"), "-D", str(data), "-l", str(log), "-o", options, "-w", "start")
        try:
            yield str(folder)
        finally:
            call(str(bin_folder / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(socket_folder: str) -> str:
    """The URL of an empty database."""
    import psycopg

    name = f"test_{uuid4().hex}"
    with psycopg.connect(f"host={socket_folder} user=postgres dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return f"postgresql://postgres@/{name}?host={socket_folder}"


def copy_of(url: str) -> str:
    """The URL of a new database with the content of another, to which nobody may be connected."""
    import psycopg

    rest, _, socket_folder = url.partition("?host=")
    name, copy = rest.rpartition("/")[2], f"test_{uuid4().hex}"
    with psycopg.connect(f"host={socket_folder} user=postgres dbname=postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {copy} TEMPLATE {name}".encode())
    return f"postgresql://postgres@/{copy}?host={socket_folder}"
