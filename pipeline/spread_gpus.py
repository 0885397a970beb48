"""A pipeline.spread.Spread over the GPUs of this machine, several matrices at once on each.

What is done to a matrix is a chain of operations, some of them small, between which Python decides something: a GPU
would wait most of the time. Here each of a few threads has a matrix and a stream of its own, so that one's operations
fill the gaps of another's, and none waits for the others. `cuda` means all GPUs that there are to be seen, and `cuda:1`
that one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Lock

import torch

from pipeline.memory import free_bytes, give_back, is_shortage
from pipeline.model import Matrix
from pipeline.parallel import map_in_order
from pipeline.spread import MatrixTask, num_workers

STREAMS = 4  # a GPU; not measured yet
SLOT_BYTES = 2**28 + 2**25  # beside a matrix: what searches a trellis (kernels/viterbi.py), and a stream's cuBLAS


def over_gpus(task: MatrixTask, matrices: Sequence[Matrix]) -> Iterator[None]:
    """Make every matrix's file; yields once for each.

    A matrix for which a GPU's memory ran out is made once more after the others, by itself, and the GPU works on one
    less at a time, or on none where others have room.

    Raises:
        torch.OutOfMemoryError: then, too.
    """
    give_back()  # what is kept for other streams counts as taken
    slots: SimpleQueue[Slot] = SimpleQueue()
    devices = gpus_of(task.device)
    sizes = [task.working_bytes(matrix) for matrix in matrices]
    largest = SLOT_BYTES + max(sizes)
    for device in [each for each in devices if free_bytes(each) >= largest] or [max(devices, key=free_bytes)]:
        if device.type == "cuda":  # loads the library, which threads must not do at the same moment
            torch.linalg.cholesky_ex(torch.eye(1, device=device))
        for _ in range(num_slots(device, sizes)):
            slots.put(Slot(device))

    num_left, lock = slots.qsize(), Lock()

    def is_made(matrix: Matrix) -> bool:
        nonlocal num_left
        slot = slots.get()
        try:
            with slot.current():
                task.make(matrix)
        except Exception as error:
            if not is_shortage(error):
                raise
            with lock:  # a slot that has no room fails at once, and would take all that is left
                if num_left > 1:
                    num_left -= 1
                    return False
            slots.put(slot)
            return False
        slots.put(slot)
        return True

    left = []
    for matrix, was_made in zip(matrices, map_in_order(is_made, matrices, num_left), strict=True):
        if was_made:
            yield
        else:
            left.append(matrix)
    for matrix in left:
        give_back()
        with Slot(max(devices, key=free_bytes)).current():
            task.make(matrix)
        yield


def gpus_of(device: str) -> list[torch.device]:
    """All that a name means."""
    if device == "cuda":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device(device)]


def num_slots(device: torch.device, working_bytes: Sequence[int]) -> int:
    """How many matrices are worked on at once on it: `STREAMS`, or as many of the largest as its memory holds."""
    each = [SLOT_BYTES + nbytes for nbytes in working_bytes]
    return num_workers(each, in_processes=False, free=free_bytes(device), most=STREAMS)


class Slot:
    """A place for one matrix at a time.

    Attributes:
        device: which "cuda" means in it.
        stream: of that device; None for one without streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def current(self) -> Iterator[None]:
        """What this thread does in the context is done here, and is done at its end."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield
            self.stream.synchronize()
