"""config.json, read by transformers without running any code that comes with the model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from pipeline.errors import ModelError
from pipeline.quiet import first_line, quiet_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_config(path: Path) -> "PretrainedConfig":
    """The config of the model in folder `path`.

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
    except ValueError as error:
        raise ModelError(f"{config_path} is not JSON ({error}). Download the model again.") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{config_path} is not a JSON object. Download the model again.")
    _refuse_quantized(config_path, raw)
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except StrictDataclassError as error:
        raise ModelError(
            f"{config_path} holds a value that transformers rejects: {' '.join(str(error).split())} "
            "Mend the file, or download the model again."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"transformers does not know the architecture in {config_path} (model_type "
            f"{raw.get('model_type')!r}): {first_line(error)} Update transformers if the model is newer. "
            "Code that comes with a model is never run, so a model that needs its own code cannot be opened."
        ) from error


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
            "it again would add its error to ours. Open the original model in bf16, fp16 or fp32 instead."
        )
