"""The same steps under Prefect: retries, a place to watch, and later schedules and fan-out. No arithmetic.

Set here, before Prefect is imported and reads its settings: nothing is told to anybody outside, and a run
without a server starts one for itself, which takes a while on a small machine.
"""

import importlib.util
import os

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")

if importlib.util.find_spec("prefect") is None:
    raise SystemExit("Error: the flows need Prefect, which is not installed. Run: pip install 'bitsmith[flows]'")
