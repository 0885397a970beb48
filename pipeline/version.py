"""The version of the installed distribution; part of every step's key, as other code may give other bytes."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("bitsmith")
except PackageNotFoundError:  # run from a source tree that was never installed
    VERSION = "0+unknown"
