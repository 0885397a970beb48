"""A network with the weights of one block in memory, so that its size does not matter.

    network = LayeredNetwork(model, "cpu")          # embeddings, norms and head are there, blocks are not
    hidden = network.embed(tokens)
    for index in range(network.num_blocks):
        with network.block(index):                  # its weights are read now, and let go at the end
            hidden = network.through(index, tokens, hidden)
    answer = network.head(tokens, hidden)

What happens between the blocks (masks, positions, what an architecture passes to each) is the network's own code: its
forward pass runs with blocks that do nothing but say what they were called with, or give back what they are told to.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.model import Matrix, Model
from pipeline.quiet import quiet_transformers
from pipeline.structure import block_names, build_skeleton, stacks_of
from pipeline.task import Task
from pipeline.unloaded import MergedError, Unloaded

NUM_PROBE_TOKENS = 4


class NotLayeredError(ModelError):
    """The network does more between its blocks than to pass the hidden states on."""


class Network(Protocol):
    """Something that runs in blocks; a window passes `embed`, `through` each of them, and `head`."""

    @property
    def network(self) -> nn.Module:
        """Its modules, for hooks."""
        ...

    @property
    def task(self) -> Task:
        """What it is asked, and what of its answer counts."""
        ...

    @property
    def device(self) -> torch.device:
        """Where weights and tensors are."""
        ...

    @property
    def num_blocks(self) -> int:
        """How many blocks."""
        ...

    def name(self, index: int) -> str:
        """Of block `index`, as users know it."""
        ...

    def layers(self, index: int) -> range:
        """Numbers of the model's layers (pipeline.model.Matrix.layer) in block `index`."""
        ...

    def weight_bytes(self, index: int) -> int:
        """Memory that the weights of block `index` take inside of `block`, and not outside."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block reads, [windows, seq_len, width], of `tokens` [windows, seq_len]."""
        ...

    def block(self, index: int) -> AbstractContextManager[None]:
        """The weights of a block, inside."""
        ...

    def through(self, index: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The output of block `index`, inside of `block`, for its input `hidden`; gradients flow if they are on."""
        ...

    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The answer [windows, scored, n] (task.py) for the last block's output."""
        ...


def open_network(model: Model, device: str, say: Callable[[str], None]) -> Network:
    """In eval mode, float32, without gradients of weights; with one block in memory where that can be.

    Args:
        say: told where it cannot.
    """
    try:
        return LayeredNetwork(model, device)
    except NotLayeredError as error:
        say(f"The whole model is held in memory: {error}")
        return WholeNetwork(model, device)


class LayeredNetwork:
    """See the module's docstring. Where some weights are merged on loading, all are held in memory all the time.

    Attributes:
        network: its modules, for hooks; a block's parameters are on the meta device outside of `block`.
        num_blocks: how many.
        device: where weights and tensors are.
    Raises:
        NotLayeredError: it cannot be run block by block; says why.
    """

    def __init__(self, model: Model, device: str) -> None:
        self.device, self.task = torch.device(device), model.task
        self._names, self._num_outputs = blocks_of(model)
        self.num_blocks = len(self._names)
        self._held: Unloaded | None = None
        try:
            skeleton = build_skeleton(model.config, experts_apart=model.experts_apart)
            self._held = Unloaded(model, device, block_names(skeleton))  # those that text does not call stay unread
            self.network = self._held.network
        except MergedError:
            self.network = model.load(device).requires_grad_(False)
        self._forwards = [self.network.get_submodule(name).forward for name in self._names]
        self._reach: int | None = None
        self._final: Tensor | None = None
        for index, name in enumerate(self._names):
            self.network.get_submodule(name).forward = self._standing_in(index)

    @property
    def is_whole(self) -> bool:
        """Are all weights held?"""
        return self._held is None

    def name(self, index: int) -> str:
        """`model.layers.3`"""
        return self._names[index]

    def layers(self, index: int) -> range:
        """Numbers of the model's layers (pipeline.model.Matrix.layer) in block `index`."""
        return range(index, index + 1)

    def weight_bytes(self, index: int) -> int:
        """Memory that the weights of block `index` take inside of `block`, and not outside."""
        return self._held.weight_bytes(self._names[index]) if self._held else 0

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block reads, [windows, seq_len, width], of `tokens` [windows, seq_len]."""
        args, kwargs = self._called_with(0, tokens)
        return args[0] if args else kwargs["hidden_states"]

    def block(self, index: int) -> AbstractContextManager[None]:
        """The weights of a block, inside."""
        return self._held.block(self._names[index]) if self._held else nullcontext()

    def through(self, index: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The output of block `index`, inside of `block`, for its input `hidden`; gradients flow if they are on."""
        args, kwargs = self._called_with(index, tokens)
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": hidden}
        output = self._forwards[index](*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The answer [windows, scored, n] (task.py) for the last block's output."""
        self._reach, self._final = None, hidden
        try:
            return self.task.answer(self.network, self.task.inputs(tokens))
        finally:
            self._final = None

    def _called_with(self, index: int, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._reach = index
        try:
            with torch.no_grad():
                self.task.answer(self.network, self.task.inputs(tokens))
        except _ReachedError as reached:
            return reached.args_and_kwargs
        finally:
            self._reach = None
        raise NotLayeredError(f"Block {self._names[index]} was not called.")

    def _standing_in(self, index: int) -> Any:
        """What a block does in the pass that goes around the blocks.

        It knows this object weakly, or a network of gigabytes would wait for the garbage collector.
        """
        known = weakref.ref(self)

        def forward(*args: Any, **kwargs: Any) -> Any:
            around = known()
            assert around is not None, "only this object runs the network"
            if index == around._reach:
                raise _ReachedError(args, kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            if around._final is not None and index == around.num_blocks - 1:
                hidden = around._final
            return hidden if around._num_outputs is None else (hidden, *(None,) * (around._num_outputs - 1))

        return forward


class WholeNetwork:
    """A network that cannot be run block by block, as a single block that gives the answer. In memory as a whole."""

    num_blocks = 1

    def __init__(self, model: Model, device: str) -> None:
        self.device, self.task = torch.device(device), model.task
        self.network = model.load(device)
        self.network.requires_grad_(False)
        self._num_layers = 1 + max(matrix.layer for matrix in model.matrices)

    def name(self, index: int) -> str:
        """See Network."""
        return "the model"

    def layers(self, index: int) -> range:
        """See Network."""
        return range(self._num_layers)

    def weight_bytes(self, index: int) -> int:
        """See Network."""
        return 0

    def embed(self, tokens: Tensor) -> Tensor:
        """Nothing: the network reads the tokens itself, for some scale what they embed. See `through`."""
        return torch.zeros(*tokens.shape, 1, device=self.device)

    def block(self, index: int) -> AbstractContextManager[None]:
        """See Network."""
        return nullcontext()

    def through(self, index: int, tokens: Tensor, hidden: Tensor) -> Tensor:
        """See Network. What is embedded gets zeros that depend on `hidden`, so that gradients can flow."""

        def attach(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + 0 * hidden.sum()

        with ExitStack() as stack:
            for module in self.network.modules():
                if isinstance(module, nn.Embedding):
                    stack.callback(module.register_forward_hook(attach).remove)
            return self.task.answer(self.network, self.task.inputs(tokens))

    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """See Network."""
        return hidden


def matrices_of(network: Network, model: Model, blocks: Iterable[int]) -> list[Matrix]:
    """The matrices in these blocks, in the model's order."""
    layers = {layer for block in blocks for layer in network.layers(block)}
    return [matrix for matrix in model.matrices if matrix.layer in layers]


def blocks_of(model: Model) -> tuple[list[str], int | None]:
    """Names of the blocks in the order of their calls, and how many things each returns; None for a bare tensor.

    Raises:
        NotLayeredError: there is more than one stack, a block is not called once, or its input is not the output of
            the block before, or it reads more than that of it.
    """
    skeleton = build_skeleton(model.config, experts_apart=model.experts_apart)
    blocks = {f"{stack}.{name}": (stack, block) for stack in stacks_of(skeleton)
              for name, block in skeleton.get_submodule(stack).named_children()}  # fmt: skip
    calls: list[tuple[str, list[Any], Any]] = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            read = args[0] if args else kwargs.get("hidden_states")
            calls.append((name, [read, *args[1:], *kwargs.values()], output))

        return hook

    for name, (_, block) in blocks.items():
        block.register_forward_hook(remember(name), with_kwargs=True)
    try:
        with quiet_transformers(), torch.no_grad():
            tokens = torch.zeros(1, NUM_PROBE_TOKENS, dtype=torch.long, device="meta")
            skeleton(**model.task.probe_inputs(tokens))
    except Exception as error:  # whatever an architecture does that meta tensors cannot
        raise NotLayeredError(f"{model.spec} cannot be probed without weights: {error}") from error
    stacks = dict.fromkeys(blocks[name][0] for name, _, _ in calls)  # text calls none of those for images
    if len(stacks) != 1:
        raise NotLayeredError(f"{model.spec} has {len(stacks)} stacks of blocks, {', '.join(stacks)}; expected one.")
    names = [name for name, (stack, _) in blocks.items() if stack in stacks]
    if [name for name, _, _ in calls] != names:
        raise NotLayeredError(f"{model.spec} does not call each block of {next(iter(stacks))} once and in order.")
    for (name, _, output), (_, (following, *others), _) in pairwise(calls):
        hidden, *more = output if isinstance(output, tuple) else (output,)
        if hidden is not following:
            raise NotLayeredError(f"{model.spec} changes what {name} gives before the next block reads it.")
        if any(given is read for given in more if isinstance(given, Tensor) for read in others):
            raise NotLayeredError(f"{model.spec} passes more than hidden states from {name} to the next block.")
    kinds = {len(output) if isinstance(output, tuple) else None for _, _, output in calls}
    if len(kinds) != 1:
        raise NotLayeredError(f"The blocks of {model.spec} return different things.")
    return names, kinds.pop()


class _ReachedError(Exception):
    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_and_kwargs = args, kwargs
