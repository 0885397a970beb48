"""Teach transformers to load a bitsmith checkpoint packed: `import quantizers` before `from_pretrained`.

The checkpoint's keys are the names of the modules' buffers, so loading is: swap the named linear layers
for empty `QuantizedLinear`s on the meta device (embeddings and heads for what embedding_swap.py says), let
transformers fill them, check that every tensor was there with its shape and dtype (transformers makes up what is
missing), and hand out the codebooks.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantizers.block_format import BlockFormat
from quantizers.embedding import PackedRows
from quantizers.embedding_swap import is_packable, swap_in
from quantizers.experts import fused_experts, set_experts_apart
from quantizers.format import StorageFormat
from quantizers.formats import PACKED_NAMES, format_from_json
from quantizers.kernel_holder import NOT_OFFLOADED
from quantizers.linear import QuantizedLinear

Headers = dict[str, tuple[list[int], str]]  # tensor name -> shape and dtype, in safetensors' spelling

QUANT_METHOD = "bitsmith"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
STORED_DTYPES = {
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def quantization_config(
    matrices: dict[str, tuple[StorageFormat, tuple[int, int]]], heads: Sequence[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json for matrices named by their modules, with shapes (out, in).

    Args:
        heads: those of `matrices` that a class without the model's head does not have.
    """
    codebooks = {form.codebook_name: form.levels.tolist() for form, _ in matrices.values()}
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "codebooks": dict(sorted(codebooks.items())),
        "matrices": {name: form.to_json() | {"shape": list(shape)} for name, (form, shape) in sorted(matrices.items())},
        "heads": sorted(heads),
    }


@register_quantization_config(QUANT_METHOD)
class BitsmithConfig(QuantizationConfigMixin):
    """See docs/checkpoint-format.md.

    Raises:
        ValueError: another format version, or an entry that is missing or wrong.
    """

    def __init__(
        self,
        format_version: int | None = None,
        codebooks: dict[str, list[Any]] | None = None,
        matrices: dict[str, dict[str, Any]] | None = None,
        heads: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if format_version not in READABLE_VERSIONS:
            raise ValueError(
                f"this checkpoint has bitsmith format version {format_version}, and this program reads "
                f"versions 1 and 2; install the bitsmith release that its recipe.json names (field `bitsmith`)"
            )
        if not isinstance(codebooks, dict) or not isinstance(matrices, dict):
            raise ValueError("quantization_config needs `codebooks` and `matrices`; the config.json is damaged")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self.format_version = format_version
        self.codebooks = codebooks
        self.matrices = matrices
        if not isinstance(heads, list | tuple):
            raise ValueError("`heads` in quantization_config is no list; the config.json is damaged")
        self.heads = list(heads)
        for name in matrices:
            self.format_of(name)

    def format_of(self, module: str) -> tuple[StorageFormat, tuple[int, int]]:
        """How the weight of `module` is stored, and its shape (out, in)."""
        try:
            entry = dict(self.matrices[module])
            rows, columns = map(int, entry.pop("shape"))
            form = format_from_json(entry)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"quantization_config of {module} is wrong: {error}; the checkpoint is damaged") from None
        codebook = self.codebooks.get(form.codebook_name)
        if not isinstance(codebook, list) or len(codebook) != len(form.levels) or not all(map(_is_level, codebook)):
            raise ValueError(
                f"quantization_config has no codebook {form.codebook_name!r} of {len(form.levels)} numbers, which "
                f"{module} needs; the checkpoint is damaged"
            )
        return form, (rows, columns)


@register_quantizer(QUANT_METHOD)
class BitsmithHfQuantizer(HfQuantizer):
    """Swaps the layers in before loading, and hands out the codebooks after.

    transformers gives a tensor that the files lack fresh memory and only warns, so the quantizer reads the names
    and shapes in the files' headers itself and refuses a checkpoint that is not complete.
    """

    quantization_config: BitsmithConfig
    requires_calibration = True  # from_pretrained cannot make such a checkpoint, `bitsmith compress` does

    def validate_environment(self, *args, device_map=None, **kwargs):
        """Raise ValueError where layers would be read from CPU or disk, pass by pass: codes are buffers, which stay."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(f"device_map puts layers on {', '.join(sorted(places))}. {NOT_OFFLOADED}")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        expected: dict[str, Tensor] = {}
        fused = fused_experts(model)
        if any(name.startswith(f"{experts}.") for experts in fused for name in config.matrices):
            set_experts_apart(model)
        for stored_name, name in _as_named(model, config).items():
            form, shape = config.format_of(stored_name)
            with torch.device("meta"):
                layer = _packed_rows(model, name, shape, form) or _packed_layer(model, name, shape, form)
            expected |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        if checkpoint_files is not None:
            _check_complete(expected, _as_loaded(model, _headers(checkpoint_files)), f"{model.base_model_prefix}.")
        self._dtypes = _plain_dtypes(model)
        return model

    def get_new_dtype(self, converter, param, dtype):
        """Packed tensors keep the dtype that they are stored in (asked by transformers 5.23, not by 5.17)."""
        (target, *_) = converter.target_patterns
        if target.rpartition(".")[2] in PACKED_NAMES:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        for stored_name, name in _as_named(model, config).items():
            form, _ = config.format_of(stored_name)
            levels = torch.tensor(config.codebooks[form.codebook_name], dtype=torch.float32)
            model.get_submodule(name).set_levels(levels)
        in_float32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, dtype in _plain_dtypes(model).items():  # transformers 5.17 leaves what it renames as it is stored
            if dtype != self._dtypes.get(name, dtype) and not any(module in name for module in in_float32):
                parameter = model.get_parameter(name)
                parameter.data = parameter.data.to(self._dtypes[name])
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _is_level(value: Any) -> bool:
    """Kernels read as many as a code can name."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype]:
    """Of the parameters that are not packed."""
    parameters = model.named_parameters()
    return {name: each.dtype for name, each in parameters if name.rpartition(".")[2] not in PACKED_NAMES}


def _as_named(model: PreTrainedModel, config: BitsmithConfig) -> dict[str, str]:
    """Each module's name in `model`, which may be the checkpoint's without its head, or with one: `bert.encoder` ..."""
    prefix, modules = f"{model.base_model_prefix}.", {name for name, _ in model.named_modules()}

    def here(name: str) -> str:
        return next((each for each in (name, name.removeprefix(prefix), prefix + name) if each in modules), name)

    names = {name: here(name) for name in config.matrices}
    return {stored: name for stored, name in names.items() if name in modules or stored not in config.heads}


def _headers(files: list[str]) -> Headers:
    """Tensor name -> shape and dtype (in safetensors' spelling), from the headers of the files."""
    headers: Headers = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    part = stored.get_slice(name)
                    headers[name] = (list(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise _damaged(str(file), str(error)) from error
    return headers


def _as_loaded(model: PreTrainedModel, stored: Headers) -> Headers:
    """By the names that transformers will give them: some architectures are stored under older ones."""
    rules, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def renamed(name: str) -> str:
        return rename_source_key(name, renamings, converters, model.base_model_prefix, known)[0]

    return stored | {renamed(name): entry for name, entry in stored.items()}


def _check_complete(expected: dict[str, Tensor], stored: Headers, base_prefix: str) -> None:
    """Raise ValueError naming the first tensor that is missing, or has another shape or (if packed) dtype.

    Files may leave out the base model's prefix, as GPT-2's do, or have it where the model has none.
    """
    for name, tensor in expected.items():
        spellings = (name, name.removeprefix(base_prefix), base_prefix + name)
        found = next((stored[spelling] for spelling in spellings if spelling in stored), None)
        if found is None or found[0] != list(tensor.shape):
            raise _damaged(name, f"expected shape {list(tensor.shape)}, found {found[0] if found else 'nothing'}")
        if name.rpartition(".")[2] in PACKED_NAMES and found[1] != STORED_DTYPES[tensor.dtype]:
            raise _damaged(name, f"expected {STORED_DTYPES[tensor.dtype]}, found {found[1]}")


def _packed_rows(model: PreTrainedModel, name: str, shape: tuple[int, int], form: StorageFormat) -> PackedRows | None:
    """An empty packed module in the place of an embedding or a head; None where `name` is neither, or not by rows."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    is_table = isinstance(module, torch.nn.Embedding) or module is model.get_output_embeddings()
    if not is_table or not isinstance(form, BlockFormat) or form.rank or not is_packable(model, name):
        return None
    found = tuple(module.weight.shape)  # type: ignore[arg-type]
    if found != shape:
        raise _foreign(model, name, f"has a weight of shape {list(found)} there, not {list(shape)}")
    return swap_in(model, name, shape, form)


def _packed_layer(model: PreTrainedModel, name: str, shape: tuple[int, int], form: StorageFormat) -> QuantizedLinear:
    """An empty packed layer in the place of a linear one."""
    old = _linear_layer(model, name, shape)
    layer = QuantizedLinear(shape, form, bias=old.bias is not None, dtype=old.weight.dtype)
    model.set_submodule(name, layer)
    return layer


def _linear_layer(model: PreTrainedModel, name: str, shape: tuple[int, int]) -> torch.nn.Linear | Conv1D:
    """The layer that a packed one replaces; `Conv1D` is GPT-2's, which stores [in, out]."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise _foreign(model, name, "has no such module") from None
    if not isinstance(layer, torch.nn.Linear | Conv1D):
        raise _foreign(model, name, f"has a {type(layer).__name__} there, not a linear layer")
    found = tuple(layer.weight.shape)[:: -1 if isinstance(layer, Conv1D) else 1]
    if found != shape:
        raise _foreign(model, name, f"has a layer of shape {list(found)} there, not {list(shape)}")
    if f"{name}.weight" in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
        raise _foreign(model, name, "ties that weight to another one")
    return layer


def _foreign(model: PreTrainedModel, name: str, what: str) -> ValueError:
    return ValueError(
        f"the checkpoint has a quantized weight for {name}, and {type(model).__name__} {what}; "
        "the config.json does not belong to these weights"
    )


def _damaged(tensor: str, what: str) -> ValueError:
    return ValueError(
        f"{tensor}: {what}; the checkpoint is incomplete or damaged, download it again or check it with "
        "`bitsmith registry verify`"
    )
