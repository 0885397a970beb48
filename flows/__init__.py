"""The same steps under Prefect: retries, a place to watch, and later schedules and fan-out. No arithmetic.

Set here, before Prefect is imported and reads its settings: nothing is told to anybody outside, and a run
without a server starts one for itself, which takes a while on a small machine.
"""

import importlib.util
import os

# Of every run, also of those that a worker starts: deployments and pools carry them there (flows/deploy.py). A run
# whose heartbeats stay away is taken for dead (flows/automations.py).
RUN_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 by default: hardly anything beside other work
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}

for _name, _value in (RUN_SETTINGS | {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180"}).items():
    os.environ.setdefault(_name, _value)

if importlib.util.find_spec("prefect") is None:
    raise SystemExit("Error: the flows need Prefect, which is not installed. Run: pip install 'bitsmith[flows]'")
