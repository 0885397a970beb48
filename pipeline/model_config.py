"""config.json, read by transformers. Code that comes with the model runs only where it is trusted."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from pipeline.errors import ModelError
from pipeline.own_code import TRUST_ADVICE, forget_code
from pipeline.quiet import first_line, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PretrainedConfig

    from pipeline.shards import TensorInfo

_QUANTIZED_NAMES = {
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    "_scale_inv": "a quantizer to fp8",
    ".weight_scale": "a quantizer to fp8 or int8",
    ".weight_packed": "compressed-tensors",
    "_blocks": "a quantizer to mxfp4",
}
_ORIGINAL = (
    "Open the original model in bf16, fp16 or fp32 instead; of one that was published in fp8 or mxfp4 alone, a copy "
    "that was dequantized once (in transformers by `dequantize=True` of its FineGrainedFP8Config or Mxfp4Config)."
)


def read_config(path: Path, *, trust_remote_code: bool = False) -> "PretrainedConfig":
    """The config of the model in folder `path`.

    Args:
        trust_remote_code: run the code that it names; see pipeline/own_code.py.
    Raises:
        ModelError: none there, not JSON, already quantized, or an architecture that transformers lacks.
    """
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelError(
            f"No config.json in {path}: this is not a model folder, or its download is incomplete. "
            "Expected config.json, safetensors weights and tokenizer files."
        )
    try:
        raw = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{config_path} is not JSON ({error}). Download the model again.") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{config_path} is not a JSON object. Download the model again.")
    _refuse_quantized(config_path, raw)
    try:
        return load_config(path, {"trust_remote_code": trust_remote_code})
    except StrictDataclassError as error:
        raise ModelError(
            f"{config_path} holds a value that transformers rejects: {' '.join(str(error).split())} "
            "Mend the file, or download the model again."
        ) from error
    except Exception as error:  # a model's own code may raise anything
        if trust_remote_code and raw.get("auto_map"):
            is_missing = isinstance(error, OSError)
            advice = "Install what it needs, or a version of transformers that it was written for."
            raise ModelError(
                f"The code that {config_path} names {'is missing' if is_missing else 'does not run'}: "
                f"{type(error).__name__}: {first_line(error)} {'Download the model again.' if is_missing else advice}"
            ) from error
        mistakes = ValueError | LookupError | TypeError | AttributeError | ArithmeticError | AssertionError
        if not isinstance(error, OSError | ImportError | mistakes):
            raise
        raise ModelError(
            f"transformers does not know the architecture in {config_path} (model_type "
            f"{raw.get('model_type')!r}): {first_line(error)} "
            f"{TRUST_ADVICE if raw.get('auto_map') else 'Update transformers if the model is newer.'}"
        ) from error


def load_config(path: Path, options: dict[str, Any]) -> "PretrainedConfig":
    """What AutoConfig reads; without trust it has lost the classes that it names.

    Args:
        options: `trust_remote_code`, and `code_revision` where the code is elsewhere.
    """
    with quiet_transformers():
        config = AutoConfig.from_pretrained(path, local_files_only=True, **options)
    if not options["trust_remote_code"]:
        forget_code(config)
    return config


def refuse_quantized(path: Path, unknown: "Iterable[TensorInfo]") -> None:
    """Raise ModelError where one of the stored tensors that the architecture does not know is a quantizer's.

    For checkpoints whose config.json does not say so.
    """
    for info in unknown:
        for ending, method in _QUANTIZED_NAMES.items():
            if info.name.endswith(ending):
                raise ModelError(
                    f"{path / info.file} holds {info.name}, as {method} leaves it: these weights are quantized "
                    f"already, and quantizing them again would add its error to ours. {_ORIGINAL}"
                )


def _refuse_quantized(config_path: Path, raw: dict[str, Any]) -> None:
    nested = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    found = next(
        (part[key] for part in nested for key in ("quantization_config", "compression_config") if part.get(key)),
        None,
    )
    if found is not None:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise ModelError(
            f"{config_path} says that this model is already quantized (quant_method {method!r}); quantizing "
            f"it again would add its error to ours. {_ORIGINAL}"
        )
