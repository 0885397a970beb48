"""Teach transformers to load a bitsmith checkpoint packed: `import quantizers` before `from_pretrained`.

The checkpoint's keys are the names of the modules' buffers, so loading is: swap the named linear layers
for empty `QuantizedLinear`s on the meta device, let transformers fill them, check every shape (its loader
takes a wrong one silently where a quantizer is set), and hand out the codebooks.
"""

from dataclasses import asdict
from typing import Any

import torch
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
        ValueError: a newer format, or an entry that is missing or wrong.
    """

    def __init__(self, format_version: int, codebooks: dict, matrices: dict, **kwargs: Any) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has bitsmith format version {format_version}, and this program reads version "
                f"{FORMAT_VERSION}; install the bitsmith release that the checkpoint's card names"
            )
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.codebooks = codebooks
        self.matrices = matrices
        for name in matrices:
            self.format_of(name)

    def format_of(self, module: str) -> tuple[StorageFormat, tuple[int, int]]:
        """How the weight of `module` is stored, and its shape (out, in)."""
        entry = dict(self.matrices[module])
        try:
            rows, columns = entry.pop("shape")
            form = StorageFormat(**entry)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"quantization_config of {module} is wrong: {error}; the checkpoint is damaged") from None
        if len(self.codebooks.get(form.codebook_name, ())) != 2**form.bits:
            raise ValueError(
                f"quantization_config has no codebook {form.codebook_name!r} of {2**form.bits} levels, which "
                f"{module} needs; the checkpoint is damaged"
            )
        return form, (int(rows), int(columns))


@register_quantizer(QUANT_METHOD)
class BitsmithHfQuantizer(HfQuantizer):
    """Swaps the layers in before loading, and checks them after."""

    requires_calibration = True  # from_pretrained cannot make such a checkpoint, `bitsmith compress` does

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        for name in config.matrices:
            form, shape = config.format_of(name)
            parent_name, _, child = name.rpartition(".")
            try:
                old = model.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"the checkpoint has a quantized weight for {name}, and {type(model).__name__} has no such module; "
                    "the config.json does not belong to these weights"
                ) from None
            with torch.device("meta"):
                layer = QuantizedLinear(shape, form, bias=old.bias is not None, dtype=old.weight.dtype)
            setattr(model.get_submodule(parent_name), child, layer)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        for name in config.matrices:
            layer = model.get_submodule(name)
            form, shape = config.format_of(name)
            for key, (size, dtype) in form.tensor_specs(shape).items():
                tensor = getattr(layer, key)
                if tensor.is_meta or tuple(tensor.shape) != size or tensor.dtype != dtype:
                    found = "nothing" if tensor.is_meta else f"{list(tensor.shape)} {tensor.dtype}"
                    raise ValueError(
                        f"{name}.{key}: expected {list(size)} {dtype}, found {found}; the checkpoint is incomplete or "
                        "damaged, download it again or check it with `bitsmith registry verify`"
                    )
            layer.set_levels(torch.tensor(config.codebooks[form.codebook_name], dtype=torch.float32))
        return model

    def get_new_dtype(self, converter, param, dtype):
        """Packed tensors keep the dtype that they are stored in."""
        return None if dtype in (torch.int32, torch.float32) else super().get_new_dtype(converter, param, dtype)

    def is_serializable(self):
        return True

    @property
    def is_trainable(self) -> bool:
        return True
