"""Teach transformers to load a bitsmith checkpoint packed: `import quantizers` before `from_pretrained`.

The checkpoint's keys are the names of the modules' buffers, so loading is: swap the named linear layers
for empty `QuantizedLinear`s on the meta device, let transformers fill them, check that every tensor was
there with its shape and dtype (transformers makes up what is missing), and hand out the codebooks.
"""

from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantizers.format import StorageFormat
from quantizers.linear import QuantizedLinear

QUANT_METHOD = "bitsmith"
FORMAT_VERSION = 1


def quantization_config(matrices: dict[str, tuple[StorageFormat, tuple[int, int]]]) -> dict[str, Any]:
    """The `quantization_config` of config.json for matrices named by their modules, with shapes (out, in)."""
    codebooks = {form.codebook_name: form.levels.tolist() for form, _ in matrices.values()}
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "codebooks": dict(sorted(codebooks.items())),
        "matrices": {name: asdict(form) | {"shape": list(shape)} for name, (form, shape) in sorted(matrices.items())},
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
        codebooks: dict[str, list[float]] | None = None,
        matrices: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has bitsmith format version {format_version}, and this program reads "
                f"version {FORMAT_VERSION}; install the bitsmith release that the checkpoint's card names"
            )
        if not isinstance(codebooks, dict) or not isinstance(matrices, dict):
            raise ValueError("quantization_config needs `codebooks` and `matrices`; the config.json is damaged")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self.format_version = format_version
        self.codebooks = codebooks
        self.matrices = matrices
        for name in matrices:
            self.format_of(name)

    def format_of(self, module: str) -> tuple[StorageFormat, tuple[int, int]]:
        """How the weight of `module` is stored, and its shape (out, in)."""
        try:
            entry = dict(self.matrices[module])
            rows, columns = map(int, entry.pop("shape"))
            form = StorageFormat(**entry)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"quantization_config of {module} is wrong: {error}; the checkpoint is damaged") from None
        if len(self.codebooks.get(form.codebook_name, ())) != 2**form.bits:
            raise ValueError(
                f"quantization_config has no codebook {form.codebook_name!r} of {2**form.bits} levels, which "
                f"{module} needs; the checkpoint is damaged"
            )
        return form, (rows, columns)


@register_quantizer(QUANT_METHOD)
class BitsmithHfQuantizer(HfQuantizer):
    """Swaps the layers in before loading, and checks them after.

    transformers gives a tensor that the files lack fresh memory and only warns, so the quantizer notes which
    packed tensors it saw, with their shapes in the file, and refuses a model that is not complete.
    """

    quantization_config: BitsmithConfig
    requires_calibration = True  # from_pretrained cannot make such a checkpoint, `bitsmith compress` does

    def __init__(self, quantization_config: BitsmithConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._expected: dict[str, tuple[int, ...]] = {}  # shape of every tensor of the swapped layers
        self._found: dict[str, tuple[int, ...]] = {}  # of those, what the files hold

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        for name in config.matrices:
            form, shape = config.format_of(name)
            old = _linear_layer(model, name, shape)
            with torch.device("meta"):
                layer = QuantizedLinear(shape, form, bias=old.bias is not None, dtype=old.weight.dtype)
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, layer)
            self._expected |= {f"{name}.{key}": tuple(tensor.shape) for key, tensor in layer.state_dict().items()}
        return model

    def get_new_dtype(self, converter, param, dtype):
        """Called once for every tensor of the files: packed ones keep the dtype that they are stored in."""
        (target, *_) = converter.target_patterns
        if target in self._expected:
            self._found[target] = tuple(param.get_shape() if hasattr(param, "get_shape") else param.shape)
            if not target.endswith(".bias"):
                return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        for name, size in self._expected.items():
            if self._found.get(name) != size:
                found = list(self._found[name]) if name in self._found else "nothing"
                raise _damaged(name, f"expected shape {list(size)}, found {found}")
        for name in config.matrices:
            layer = model.get_submodule(name)
            form, shape = config.format_of(name)
            for key, (_, dtype) in form.tensor_specs(shape).items():
                found_dtype = getattr(layer, key).dtype
                if found_dtype != dtype:
                    raise _damaged(f"{name}.{key}", f"expected {dtype}, found {found_dtype}")
            layer.set_levels(torch.tensor(config.codebooks[form.codebook_name], dtype=torch.float32))
        return model

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True


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
