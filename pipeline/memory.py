"""How much memory this process may still take."""

from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:  # Windows has no limits of that kind
    resource = None  # type: ignore[assignment]

CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """What nobody uses now of a device's memory; of the host's, within the limits of process and container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min(psutil.virtual_memory().available, _left_of_address_space(), _left_of_cgroup(_cgroup())))


def _left_of_address_space() -> int:
    most = resource.getrlimit(resource.RLIMIT_AS)[0] if resource else -1
    return most - psutil.Process().memory_info().vms if most > 0 else psutil.virtual_memory().total


def _left_of_cgroup(group: Path) -> int:
    """Of the group and of all above it (cgroup v2)."""
    left = psutil.virtual_memory().total
    for place in (group, *group.parents):
        if place == CGROUPS.parent:
            break
        try:
            limit, used = ((place / name).read_text().strip() for name in ("memory.max", "memory.current"))
        except OSError:
            continue
        if limit != "max":
            left = min(left, int(limit) - int(used))
    return left


def _cgroup() -> Path:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return CGROUPS
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    return CGROUPS / own
