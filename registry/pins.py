"""A lock file: which commit and which manifest of each repository a service runs, so that no pull brings another.

    {"format": 1, "models": {"user/repo": {"name": "...", "revision": "v3", "commit": "...", "manifest_sha256": "..."}}}

It belongs into version control, beside the service's code.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from registry.artifact import checked_digest
from registry.errors import PinError
from registry.lock import exclusive
from registry.store import disk_errors, write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Pin:
    """One line of a lock file.

    Attributes:
        name: in the registry.
        revision: what was asked for: a tag, a branch or a commit.
        commit: 40 hex digits.
        manifest_sha256: of bitsmith-manifest.json, which has the hash of everything else.
    """

    name: str
    revision: str
    commit: str
    manifest_sha256: str


def read_pin(path: Path, repo_id: str) -> Pin | None:
    """The pin of the repository; None where there is no file or no such line. Raises PinError for a damaged file."""
    return _read(path).get(repo_id)


def write_pin(path: Path, repo_id: str, pin: Pin) -> None:
    """Add the pin of one repository and leave the others; whole or not at all.

    Raises:
        PinError: another process has pinned it to something else meanwhile.
    """
    with exclusive(path.with_name(f".{path.name}.lock")):
        pins = _read(path)
        if pins.get(repo_id, pin) != pin:
            raise PinError(
                f"{path} has come to pin {repo_id} at commit {pins[repo_id].commit[:12]}, and {pin.commit[:12]} was "
                "pulled. Run the same command again: it pulls what is pinned."
            )
        models = {key: asdict(each) for key, each in sorted((pins | {repo_id: pin}).items())}
        write_atomically(path, json.dumps({"format": FORMAT, "models": models}, indent=2) + "\n")


def _read(path: Path) -> dict[str, Pin]:
    with disk_errors(path):
        if not path.exists():
            return {}
        content = path.read_bytes()
    try:
        found = json.loads(content)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}")
        pins = {repo_id: Pin(**pin) for repo_id, pin in found["models"].items()}
        for pin in pins.values():
            checked_digest(pin.manifest_sha256)
            if not all(isinstance(value, str) for value in asdict(pin).values()):
                raise TypeError("a value is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PinError(
            f"{path} is not a lock file of bitsmith in format {FORMAT} ({type(error).__name__}: {error}). Restore it "
            "from version control, or remove it and pull again to write a new one."
        ) from error
    return pins
