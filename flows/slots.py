"""One run at a time on a GPU, and one of a model: slots of the server, as Prefect's global concurrency limits.

A limit is made when it is first needed, so that no list of machines is kept anywhere. A slot is a lease of a minute
that the run renews: one that died frees it. Without a server of its own a run shares with nobody, and takes none.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL

from pipeline.errors import RecipeError
from pipeline.home import expanded
from pipeline.sources import DEMO

LEASE_SECONDS = 60.0
_ASK_GPUS = (
    "import sys, torch; from pipeline.spread_gpus import gpus_of; torch.empty(0, device=sys.argv[1]); "
    "print(*(torch.cuda.get_device_properties(each).uuid for each in gpus_of(sys.argv[1])))"
)


@contextmanager
def alone_with(model: str, device: str) -> Iterator[None]:
    """Wait until nobody else compresses the model, nor uses a GPU that the device means; then keep others out.

    Raises:
        RecipeError: there is no such device here.
    """
    names = [f"bitsmith-model-{_slug(model)}"]
    if device.startswith("cuda"):
        names += [f"bitsmith-gpu-{number}" for number in gpu_ids(device)]
    with holding(names):
        yield


@contextmanager
def holding(names: list[str]) -> Iterator[None]:
    """All slots at once, or wait."""
    if not PREFECT_API_URL.value():
        yield
        return
    for name in names:
        _make(name)
    with concurrency(names, strict=True, lease_duration=LEASE_SECONDS):
        yield


def gpu_ids(device: str) -> list[str]:
    """Own numbers of the GPUs that it means, the same in every container that sees them.

    Asked for by another process: this one, which only waits, takes no memory there.
    """
    asked = subprocess.run([sys.executable, "-c", _ASK_GPUS, device], capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RecipeError(f"Device {device!r} cannot be used: {reason}. Expected cpu, cuda or cuda:N.")
    return asked.stdout.split()


def _make(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
            except ObjectAlreadyExists:  # made by another run just now
                return


def _slug(model: str) -> str:
    path = expanded(model)
    if model != DEMO and path.exists():  # which has more than one name
        model = str(path.resolve())
    word = re.sub(r"[^a-z0-9]+", "-", model.lower().rstrip("/").rpartition("/")[2]).strip("-")
    return f"{word[:40]}-{sha256(model.encode()).hexdigest()[:8]}"
