"""What an architecture is made of, found without a single weight.

The model is built from its config on torch's meta device: shapes, no memory. Every linear layer inside the
repeated blocks is a site that can be compressed; every other parameter gets the reason why it is not. One
forward pass on meta tells which layers read the very same tensor, and so form a group (q/k/v, gate/up).
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ModelError
from pipeline.own_code import brings_code
from pipeline.quiet import first_line, quiet_transformers
from pipeline.task import auto_class, task_of
from quantizers.embedding_swap import input_embeddings, is_packable, tied_to
from quantizers.experts import set_experts_apart

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Siblings that read one tensor in every architecture we know: used only where the forward pass on meta fails.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
POSITION_EMBEDDINGS = ("position_embeddings", "embed_positions", "wpe")  # a row a position
NUM_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Site:
    """A linear layer inside the blocks; `shape` is (out, in), `transposed` says that [in, out] is stored."""

    name: str
    module: str
    shape: tuple[int, int]
    transposed: bool
    layer: int
    group: str


@dataclass(frozen=True)
class Embedding:
    """Token embeddings, or an output head of its own (output embeddings): may be packed.

    Attributes:
        shape: [tokens, width].
        is_head: it is the output's.
        gives_logits: the output head multiplies with it, being it or sharing its weight.
    """

    module: str
    shape: tuple[int, int]
    is_head: bool
    gives_logits: bool

    @property
    def name(self) -> str:
        """Of the parameter."""
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Structure:
    """What `read_structure` finds.

    Attributes:
        sites: by layer, then in module order.
        embeddings: those of the input first; ones that quantizers/embedding_swap.py knows.
        shapes: every parameter and saved buffer that the architecture knows -> its shape as stored.
        required: the parameters that a checkpoint must bring.
        reasons: every name in `shapes` that is no site -> why.
        ties: name -> the name whose tensor it shares.
        num_positions: the longest text that it can read, in tokens; None where positions are computed.
    """

    sites: tuple[Site, ...]
    embeddings: tuple[Embedding, ...]
    shapes: dict[str, tuple[int, ...]]
    required: frozenset[str]
    reasons: dict[str, str]
    ties: dict[str, str]
    num_positions: int | None


def build_skeleton(config: "PretrainedConfig", *, experts_apart: bool = False) -> "PreTrainedModel":
    """The model of `config` on the meta device, in eval mode.

    Args:
        experts_apart: each expert of a mixture as layers of its own (quantizers/experts.py).
    Raises:
        ModelError: transformers knows no language model for this config.
    """
    try:
        # bfloat16, because some fused kernels have a meta implementation for it alone
        with quiet_transformers(), torch.device("meta"):
            model = auto_class(config).from_config(
                config, dtype=torch.bfloat16, attn_implementation="eager", trust_remote_code=brings_code(config)
            )
    except Exception as error:  # a model's own code may raise anything
        mistakes = ValueError | LookupError | TypeError | AttributeError | ArithmeticError | AssertionError
        known = mistakes | ImportError | RuntimeError
        if not isinstance(error, known) and not brings_code(config):
            raise
        advice = "Check config.json, or update transformers."
        if brings_code(config):
            advice = "Its own code ran: install what it needs, or a version of transformers that it was written for."
        raise ModelError(
            f"transformers cannot build a language model for model_type "
            f"{getattr(config, 'model_type', '?')!r}: {first_line(error)} {advice}"
        ) from error
    if experts_apart:
        set_experts_apart(model)
    return model.eval()


def read_structure(model: "PreTrainedModel") -> Structure:
    """Sites, groups, ties and reasons of a model on the meta device."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    layers = _layers_of_blocks(model)
    linears: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    groups = _groups_by_forward(model, linears, layers) or _groups_by_name(linears)
    group_of = {module: _group_name(members) for members in groups for module in members}
    shared = set(ties) | set(ties.values())
    sites = [
        _site(module, linears[module], layers[module], group_of[module])
        for module in linears
        if module in layers and module in group_of and f"{module}.weight" not in shared
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    site_names = {site.name for site in sites}
    return Structure(
        sites=tuple(sorted(sites, key=lambda site: site.layer)),
        embeddings=tuple(_embeddings(model)),
        shapes=shapes,
        required=frozenset(name for name, _ in model.named_parameters() if name not in ties),
        reasons={
            name: _reason(model, name, len(shape), ties, layers)
            for name, shape in shapes.items()
            if name not in site_names
        },
        ties=ties,
        num_positions=num_positions(model),
    )


def num_positions(model: "PreTrainedModel") -> int | None:
    """The longest text where positions are embedded, else None; RoBERTa and its kin count from the padding's on."""
    embedded = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_EMBEDDINGS
    ]
    if not embedded:
        return None
    padded = [each.num_embeddings - each.padding_idx - 1 for each in embedded if each.padding_idx is not None]
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min([*padded, *([stated] if stated else [])], default=None)


def stacks_of(model: nn.Module) -> list[str]:
    """Names of the outermost lists of repeated blocks."""
    stacks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside and _is_stack(model, module):
            stacks.append(name)
    return stacks


def block_names(model: nn.Module) -> list[str]:
    """All repeated blocks, of text and of whatever else: `model.layers.0`, ..."""
    return [f"{stack}.{name}" for stack in stacks_of(model) for name, _ in model.get_submodule(stack).named_children()]


def _layers_of_blocks(model: "PreTrainedModel") -> dict[str, int]:
    """Module name -> index of the block it is in, for every module inside an outermost stack of blocks.

    A decoder's blocks are counted on after the encoder's.
    """
    layers, first = {}, 0
    for stack in stacks_of(model):
        blocks = list(model.get_submodule(stack).children())
        for index, block in enumerate(blocks):
            layers.update({f"{stack}.{index}.{name}": first + index for name, _ in block.named_modules() if name})
        first += len(blocks) if model.config.is_encoder_decoder else 0
    return layers


def _is_stack(model: nn.Module, modules: nn.ModuleList) -> bool:
    num_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    # hybrid architectures alternate two block classes in one list as long as the model is deep
    return len(modules) > 0 and (len({type(block) for block in modules}) == 1 or len(modules) == num_layers)


def _groups_by_forward(
    model: "PreTrainedModel", linears: dict[str, nn.Module], layers: dict[str, int]
) -> list[list[str]]:
    """The called linear layers, together where those of a block read the same tensors; empty if meta cannot run."""
    inputs: dict[str, list[Any]] = defaultdict(list)  # holds the tensors, so that no id is used twice

    def remember(name: str) -> Any:
        return lambda module, args, kwargs: inputs[name].append(args[0] if args else next(iter(kwargs.values())))

    handles = [module.register_forward_pre_hook(remember(name), with_kwargs=True) for name, module in linears.items()]
    try:
        tokens = torch.zeros(1, NUM_PROBE_TOKENS, dtype=torch.long, device="meta")
        with quiet_transformers(), torch.no_grad():
            model(**task_of(model.config).probe_inputs(tokens))
    except Exception:  # whatever an architecture does that meta tensors cannot: the fallback knows less
        return []
    finally:
        for handle in handles:
            handle.remove()
    by_input: dict[tuple[int | None, ...], list[str]] = defaultdict(list)
    for name in linears:
        if name in inputs:
            by_input[layers.get(name), *map(id, inputs[name])].append(name)
    return list(by_input.values())


def _groups_by_name(linears: dict[str, nn.Module]) -> list[list[str]]:
    by_key: dict[tuple[str, object], list[str]] = defaultdict(list)
    for name in linears:
        parent, _, kind = name.rpartition(".")
        siblings = next((siblings for siblings in SIBLINGS if kind in siblings), kind)
        by_key[parent, siblings].append(name)
    return list(by_key.values())


def _group_name(members: list[str]) -> str:
    """`model.layers.0.self_attn.q_proj+k_proj+v_proj`: the shared path, then what differs."""
    if len(members) == 1:
        return members[0]
    parts = [name.split(".") for name in members]
    num_shared = 0
    while all(len(path) > num_shared + 1 and path[num_shared] == parts[0][num_shared] for path in parts):
        num_shared += 1
    prefix = ".".join(parts[0][:num_shared])
    return ".".join(filter(None, [prefix, "+".join(".".join(path[num_shared:]) for path in parts)]))


def _site(name: str, module: nn.Module, layer: int, group: str) -> Site:
    transposed = isinstance(module, Conv1D)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    num_rows, num_columns = weight.shape
    shape = (num_columns, num_rows) if transposed else (num_rows, num_columns)
    return Site(f"{name}.weight", name, shape, transposed, layer, group)


def _embeddings(model: "PreTrainedModel") -> Iterator[Embedding]:
    head = model.get_output_embeddings()
    output = next((name for name, module in model.named_modules() if module is head), None)
    for name in dict.fromkeys((input_embeddings(model), output)):
        if name is not None and is_packable(model, name):
            rows, columns = model.get_parameter(f"{name}.weight").shape
            gives_logits = output in (name, *tied_to(model, name))
            yield Embedding(name, (rows, columns), is_head=name == output, gives_logits=gives_logits)


def _reason(
    model: "PreTrainedModel", name: str, num_dimensions: int, ties: dict[str, str], layers: dict[str, int]
) -> str:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    is_head = owner is model.get_output_embeddings()
    if name in ties:
        return f"{'output head, ' if is_head else ''}tied to {ties[name]}"
    if is_head:
        return "output head"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if leaf.endswith("bias"):
        return "bias"
    if "norm" in type(owner).__name__.lower():
        return "norm"
    if name in ties.values():
        return "shared with another layer"
    if owner_name not in layers:
        return "outside the blocks"
    if isinstance(owner, nn.Linear | Conv1D):
        return "its layer is never called on text, or its weight is read without calling the layer"
    if num_dimensions == 3:
        return "one 3-D tensor for several matrices (experts, convolution): not supported yet"
    return "not a linear layer"
