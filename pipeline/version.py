"""The version of the installed distribution, part of every step's key, as other code may give other bytes; and of what
it computes with, which is only noted: results that are there stay good after an upgrade.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("bitsmith")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "0+unknown"

TOOLS = {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")}
