"""A compressed model in memory: the original with its planned layers swapped for packed ones."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.allocation import Plan
from pipeline.decompose import read_matrix
from pipeline.errors import CheckpointError
from pipeline.memory import is_shortage
from pipeline.model import UNUSED, Model
from pipeline.model_config import load_config
from pipeline.output import check_compressed
from pipeline.own_code import TRUST_ADVICE, loading_options, names_code
from pipeline.quiet import first_line, quiet_transformers
from pipeline.stored_names import loaded_names
from pipeline.task import auto_class
from pipeline.unloaded import MergedError, Unloaded
from pipeline.version_documents import read_document, reading
from quantizers import BlockFormat, QuantizedLinear
from quantizers.embedding import QuantizedHead, TiedHead
from quantizers.embedding_swap import swap_in
from quantizers.transformers_plugin import QUANT_METHOD


def packed_model(
    model: Model, plan: Plan, matrix_path: Callable[[str], Path], kept: Mapping[str, Tensor] = MappingProxyType({})
) -> PreTrainedModel:
    """The original in float32 on the CPU, each planned layer replaced by what `decompose` wrote for it.

    Args:
        kept: parameter name -> value in place of the original's, of parameters that are not planned.
    """
    shared = _sharing(model, plan)
    try:
        network = Unloaded(model, "cpu", [*plan.packed, *shared]).network
    except MergedError:
        network = model.load()
    for module, embedding in plan.embeddings.items():
        assert isinstance(embedding.format, BlockFormat), "as planned_embeddings makes sure"
        swap_in(network, module, embedding.shape, embedding.format).fill(read_matrix(matrix_path(module), plan, module))
    for module in (*plan.embeddings, *shared):
        head = network.get_submodule(module)
        if isinstance(head, QuantizedHead | TiedHead) and head.bias is not None:
            bias = f"{module}.bias"
            stored = model.tensor(bias if bias in model.tensors else model.ties[bias])
            head.bias = nn.Parameter(stored.float(), requires_grad=False)
    for module in plan.matrices:
        parent, _, child = module.rpartition(".")
        bias = f"{module}.bias"
        quantized = read_matrix(matrix_path(module), plan, module)
        layer = QuantizedLinear.from_quantized(quantized, model.tensor(bias).float() if bias in model.tensors else None)
        setattr(network.get_submodule(parent), child, layer)
    network.load_state_dict(kept, strict=False)
    return network


def _sharing(model: Model, plan: Plan) -> list[str]:
    """Modules that have the weight of packed embeddings."""
    packed = {f"{module}.weight" for module in plan.embeddings}
    return [name.removesuffix(".weight") for name, source in model.ties.items() if source in packed]


def load_packed(
    folder: Path, device: str = "cpu", dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A compressed folder as transformers loads it: packed, on the device.

    Args:
        dtype: of what is not packed; None for float32 on the CPU and the checkpoint's own on a GPU.
        trust_remote_code: run the code that the original brings; see pipeline/own_code.py.
    Raises:
        CheckpointError: it is not a folder that bitsmith wrote, or it is damaged.
    """
    check_compressed(folder)
    options = loading_options(folder, trust_remote_code)
    try:
        config = load_config(folder, options)
        with quiet_transformers():
            loaded: Any = auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype or (torch.float32 if device == "cpu" else "auto"),
                device_map={"": device},  # tensor by tensor, with no copy of the model elsewhere first
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # a model's own code may raise anything
        is_known = trust_remote_code or isinstance(error, OSError | ValueError | RuntimeError | TypeError)
        if not is_known or is_shortage(error):
            raise
        advice = "" if trust_remote_code or not names_code(folder) else f" {TRUST_ADVICE}"
        raise CheckpointError(f"{folder} does not load: {error}{advice}") from error
    network, found = loaded
    _check_whole(folder, network, found)
    network.to(torch.device(device))  # type: ignore[arg-type]
    return network.eval()


def _check_whole(folder: Path, network: PreTrainedModel, found: dict[str, Any]) -> None:
    """Raise CheckpointError where transformers made up a weight, or left one out, of which it only warns."""
    named = getattr(network.config, "quantization_config", None)
    method = named.get("quant_method") if isinstance(named, dict) else getattr(named, "quant_method", None)
    if method != QUANT_METHOD:
        raise CheckpointError(f"{folder / 'config.json'} does not say how the weights are packed: it is damaged.")
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        wrong = set(map(str, found[what]))
        if wrong and what == "unexpected_keys":
            unused = _unused(folder)
            wrong -= unused | loaded_names(network, unused)
        if wrong:
            some = ", ".join(sorted(wrong)[:5])
            raise CheckpointError(
                f"{folder} has {what.replace('_', ' ')}: {some}. It is damaged or incomplete: make it again, or pull "
                "it from where it was pushed."
            )


def _unused(folder: Path) -> set[str]:
    """Tensors that the original has, too, and that its own class does not load, such as a head for another task."""
    with reading(what := f"plan.json in {folder}"):
        skipped = read_document(folder / "plan.json", what).get("skipped", {})
        return {name for name, reason in skipped.items() if reason == UNUSED}


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a compressed folder.

    Raises:
        CheckpointError: there is none that can be used.
    """
    options = loading_options(folder, trust_remote_code)
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # a tokenizer's own code may raise anything
        if not trust_remote_code and not isinstance(error, OSError | ValueError | KeyError | TypeError | ImportError):
            raise
        advice = "" if trust_remote_code or not names_code(folder) else f" {TRUST_ADVICE}"
        raise CheckpointError(f"No usable tokenizer in {folder}: {first_line(error)}{advice}") from error


def load_with_adapter(
    folder: Path,
    adapter: Path | None,
    device: str,
    dtype: torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The same, with what `finetune` wrote for it on top, if that is asked for.

    Raises:
        CheckpointError: see `load_packed`; or the adapter is damaged, or another model's.
    """
    if adapter is None:
        return load_packed(folder, device, dtype, trust_remote_code=trust_remote_code)
    from pipeline.adapter import load_tuned  # brings peft along, which not everybody has

    tuned = load_tuned(folder, adapter, device, dtype, trust_remote_code=trust_remote_code)
    return tuned.get_base_model()  # type: ignore[return-value]


def unpack(network: PreTrainedModel) -> None:
    """Make packed layers and heads dense, in place: a sample of text would dequantize them anew for each token."""
    kinds = QuantizedLinear | QuantizedHead | TiedHead
    packed = {name: module for name, module in network.named_modules() if isinstance(module, kinds)}
    for name, layer in packed.items():
        network.set_submodule(name, _dense(layer, network.dtype))


def _dense(layer: QuantizedLinear | QuantizedHead | TiedHead, dtype: torch.dtype) -> nn.Linear:
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
    dense.register_parameter("bias", layer.bias)
    return dense
