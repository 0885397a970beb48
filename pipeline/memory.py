"""How much memory this process may still take, and what it need not keep."""

import ctypes
import errno
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

try:
    import resource
except ImportError:  # Windows has no limits of that kind
    resource = None  # type: ignore[assignment]

CGROUPS = Path("/sys/fs/cgroup")
# limit, use, and the line of memory.stat with what is only cached of files, of cgroup v2 and of v1
CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_bytes(device: "torch.device") -> int:
    """What nobody uses now of a device's memory; of the host's, within the limits of process and container."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = min(psutil.virtual_memory().available, _left_of_address_space())
    return max(0, min([free, *(_left_of_group(place) for place in _groups(_own_groups()))]))


def give_back() -> None:
    """Return to the system what is freed, which C libraries and torch keep: half a gigabyte after a stage."""
    with suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def forget_device_peaks() -> None:
    """Start the high-water marks of all GPUs that this process uses anew."""
    for device in _used_devices():
        sys.modules["torch"].cuda.reset_peak_memory_stats(device)


def device_peak_bytes() -> int:
    """Taken by this process since then, of the GPU of which it took most; 0 where it uses none."""
    return max((sys.modules["torch"].cuda.max_memory_reserved(device) for device in _used_devices()), default=0)


def _used_devices() -> range:
    torch = sys.modules.get("torch")  # a stage without it is not to load it
    return range(torch.cuda.device_count() if torch and torch.cuda.is_initialized() else 0)


def is_shortage(error: BaseException) -> bool:
    """Did memory run out: Python's, the system's, that of torch on the CPU, or a device's (torch.OutOfMemoryError)?"""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    said = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def _left_of_address_space() -> int:
    most = resource.getrlimit(resource.RLIMIT_AS)[0] if resource else -1
    return most - psutil.Process().memory_info().vms if most > 0 else psutil.virtual_memory().total


def _own_groups() -> list[str]:
    """Lines like `0::/user.slice` (v2) and `4:memory:/docker/28fd` (v1)."""
    try:
        return Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []


def _groups(lines: list[str]) -> Iterator[Path]:
    """Folders of the groups that limit memory, innermost first, with all above them."""
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = CGROUPS / controllers
            innermost = top / path.lstrip("/")
            yield from (place for place in (innermost, *innermost.parents) if place.is_relative_to(top))


def _left_of_group(place: Path) -> int:
    for limit_file, used_file, cached_line in CGROUP_FILES:
        try:
            limit, used = ((place / name).read_text().strip() for name in (limit_file, used_file))
            lines = (place / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        if limit == "max":
            break
        cached = next((int(line.split()[1]) for line in lines if line.startswith(f"{cached_line} ")), 0)
        return int(limit) - int(used) + cached
    return psutil.virtual_memory().total
