"""Where bitsmith keeps what outlives a command: the registry, converted models, unfinished work.

$BITSMITH_HOME (default ~/.bitsmith)
    registry/            versions and step results, content-addressed
    converted/<sha256>/  GGUF files turned into safetensors folders once
"""

import os
from pathlib import Path


def home() -> Path:
    """The folder named by `BITSMITH_HOME`, or `~/.bitsmith`; not created here."""
    return Path(os.environ.get("BITSMITH_HOME") or Path.home() / ".bitsmith").expanduser()
