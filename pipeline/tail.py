"""How many of the last blocks are held in memory together, to save their second forward pass.

Blocks that are held one at a time are passed forward twice: once to reach the loss, and again on the way back, because
what they computed inside could not be kept. The last ones, the tail, can do both at once, as many as there is room for:
all of a small model. The numbers are the same to the last bit.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pipeline.layered import Network
from pipeline.memory import free_bytes

FREE_SHARE = 0.5  # of the memory that nobody uses
MOST_BYTES = 4 * 2**30  # more would save little time of a large model, and lose more of it in a kill


def tail_of(network: Network, tokens: Tensor, bytes_at: Callable[[int], int]) -> range:
    """The blocks of the tail; at least the last one, which needs no second pass anyway.

    Args:
        tokens: [windows, seq_len], which are passed one window at a time.
        bytes_at: what the caller keeps of a block beside its weights.
    """
    last = network.num_blocks - 1
    each = [network.weight_bytes(block) + bytes_at(block) for block in range(network.num_blocks)]
    room = tail_room(free_bytes(network.device))
    if last == 0 or each[last] >= room:
        return range(last, last + 1)
    kept = _kept_bytes(network, last, tokens[:1])
    return tail_within(room, [nbytes + kept for nbytes in each])


def tail_room(free: int) -> int:
    """Bytes that the tail may take where so many are free."""
    return min(MOST_BYTES, int(FREE_SHARE * free))


def tail_within(room: int, block_bytes: Sequence[int]) -> range:
    """The last blocks that take no more than `room` together; at least one."""
    first = len(block_bytes) - 1
    room -= block_bytes[first]
    while first > 0 and room >= block_bytes[first - 1]:
        first -= 1
        room -= block_bytes[first]
    return range(first, len(block_bytes))


def _kept_bytes(network: Network, index: int, window: Tensor) -> int:
    """What autograd keeps of a window [1, seq_len] in a block, beside weights."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with network.block(index), torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network.through(index, window, network.embed(window).detach().requires_grad_(True))
        weights = {each.untyped_storage().data_ptr() for each in network.network.parameters() if not each.is_meta}
        del output  # its graph holds what is kept, so that no address came twice
    return sum(nbytes for address, nbytes in kept.items() if address not in weights)
