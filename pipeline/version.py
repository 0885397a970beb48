"""The version of the installed distribution, part of every step's key, as other code may give other bytes; and of what
it computes with, which is only noted: results that are there stay good after an upgrade.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "0+unknown"
try:
    VERSION = version("bitsmith")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = UNKNOWN

TOOLS = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}


def requirement() -> str:
    """What pip installs to get this program, by which a version was read that it publishes."""
    return "bitsmith" if VERSION == UNKNOWN else f"bitsmith=={VERSION}"
