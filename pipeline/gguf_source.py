"""A GGUF file as a safetensors folder, converted once and found again by its sha256.

    $BITSMITH_HOME/converted/<sha256 of the GGUF>/
        config.json  model.safetensors (bfloat16)  generation_config.json
        tokenizer.json  tokenizer_config.json  chat_template.jinja
        source.json       file name, sha256, name and licence as the GGUF states them

transformers reads weights, config and vocabulary; what it leaves out (a chat template, the way in which some
tokenizers split digits, the context length) is repaired from the GGUF's own metadata. GGUF weights are
quantized already: what is compressed here is that rounded model, and it is what comparisons are made with.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.disk_space import disk_may_fill_up
from pipeline.errors import ModelError
from pipeline.home import home
from pipeline.progress import Progress
from pipeline.quiet import quiet_transformers
from registry.lock import exclusive

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerBase

GGUF_MAGIC = b"GGUF"
BYTES_A_PARAM = 2  # of bfloat16
# vocabularies that split numbers into single digits before byte-level BPE; transformers splits as GPT-2 does
SINGLE_DIGIT_VOCABULARIES = ("smollm", "starcoder", "refact", "command-r")


def convert_gguf(path: Path, progress: Progress) -> Path:
    """The safetensors folder made from the GGUF at `path`; made now if it is not there yet.

    The weights pass through memory in bfloat16, two bytes a parameter.

    Raises:
        ModelError: damaged, of an unknown architecture, or quantized in a way that cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise ModelError(f"{path} is no GGUF file: its first bytes are not 'GGUF'. Download it again.")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    target = home() / "converted" / sha256
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{sha256[:16]}")
    with exclusive(work.with_suffix(".lock"), lambda: progress.say(f"Another process converts {path.name}")):
        if target.is_dir():
            return target
        progress.say(f"Converting {path.name} to safetensors, once, into {target}")
        reader = _read(path)
        _refuse_unreadable_types(path, reader)
        shutil.rmtree(work, ignore_errors=True)  # left by a kill
        try:
            with disk_may_fill_up(target.parent, BYTES_A_PARAM * sum(int(each.n_elements) for each in reader.tensors)):
                _write(path, sha256, reader, work)
                _publish(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _read(path: Path) -> "GGUFReader":
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # the reader indexes into the file unchecked: damage shows as any error
        raise ModelError(
            f"{path} is damaged or cut off: its GGUF header does not fit its {path.stat().st_size} bytes "
            f"({type(error).__name__}: {error}). Download it again."
        ) from error


def _refuse_unreadable_types(path: Path, reader: "GGUFReader") -> None:
    from gguf import dequantize

    unreadable = set()
    for tensor_type, data in {tensor.tensor_type: tensor.data for tensor in reader.tensors}.items():
        try:
            dequantize(data[:1], tensor_type)
        except NotImplementedError:
            unreadable.add(tensor_type.name)
    if unreadable:
        raise ModelError(
            f"{path} stores tensors as {', '.join(sorted(unreadable))}, which transformers cannot read. "
            "Choose a GGUF of the same model in another type (F16, BF16, Q8_0, Q4_K_M ...)."
        )


def _write(path: Path, sha256: str, reader: "GGUFReader", folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        # its own progress bar writes to stderr, whatever one asks for
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                local_files_only=True,
                trust_remote_code=False,  # what lies beside the file is not asked
            )
            tokenizer = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # foreign parser on a foreign file
        raise ModelError(
            f"transformers cannot open {path}: {type(error).__name__}: {error}. The file is damaged, or its "
            f"architecture ({_field(reader, 'general.architecture')}) is not among those it reads from GGUF. "
            "Download it again, or give the original safetensors model."
        ) from error
    _repair_tokenizer(tokenizer, reader, getattr(model.config, "max_position_embeddings", None))
    _forget_gguf(model)
    folder.mkdir()
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    facts = {
        "file": path.name,
        "sha256": sha256,
        "name": _field(reader, "general.name"),
        "license": _field(reader, "general.license"),
    }
    (folder / "source.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget_gguf(model: Any) -> None:
    """Make a plain bf16 model of it: `save_pretrained` refuses models that remember a quantizer."""
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = ""


def _repair_tokenizer(tokenizer: "PreTrainedTokenizerBase", reader: "GGUFReader", context_length: int | None) -> None:
    from tokenizers import pre_tokenizers

    if tokenizer.chat_template is None:
        tokenizer.chat_template = _field(reader, "tokenizer.chat_template")
    if context_length:
        tokenizer.model_max_length = context_length
    if _field(reader, "tokenizer.ggml.pre") in SINGLE_DIGIT_VOCABULARIES:
        backend: Any = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _field(reader: "GGUFReader", key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _publish(work: Path, target: Path) -> None:
    for path in [*sorted(work.iterdir()), work]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    work.rename(target)
