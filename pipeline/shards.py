"""The safetensors files of a model folder: which there are, what their headers say, whether they are whole.

    model.safetensors                                  one file, or
    model.safetensors.index.json                       {"weight_map": {tensor: file}} and
    model-00001-of-00002.safetensors ...               its shards

    a shard: 8 bytes N, little endian | N bytes of JSON {tensor: {dtype, shape, data_offsets}} | data

Only headers are read here, so a model of any size opens at once and a cut-off download is found at once.
"""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")  # of weights that are not quantized
# safetensors' spelling -> bits of one element
DTYPE_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64},
    **{"F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8},
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it. `name` is the stored one, `file` is relative to the folder."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int

    @property
    def files(self) -> tuple[str, ...]:
        """All that it is read from."""
        return (self.file,)

    def read(self, folder: Path) -> "Tensor":
        """As stored: its own dtype and order, on the CPU."""
        from safetensors import safe_open  # with torch, which reading headers does without

        with safe_open(folder / self.file, framework="pt") as shard:
            return shard.get_tensor(self.name)


def read_folder(folder: Path) -> tuple[TensorInfo, ...]:
    """Every tensor of the model in `folder`, by file and then in header order; no tensor data are read.

    Raises:
        ModelError: no safetensors there, a shard is missing or damaged, or the index and the shards disagree.
    """
    if (folder / SINGLE_FILE).is_file():
        return tuple(read_header(folder / SINGLE_FILE))
    if not (folder / INDEX_FILE).is_file():
        refuse_pickle([path.name for path in folder.iterdir()], str(folder))
        raise ModelError(
            f"No weights in {folder}: expected {SINGLE_FILE}, or {INDEX_FILE} with its shards. "
            "Check that this is a model folder and that its download has finished."
        )
    weight_map = _read_index(folder / INDEX_FILE)
    missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
    if missing:
        raise ModelError(
            f"{len(missing)} of the {len(set(weight_map.values()))} shards named by {folder / INDEX_FILE} "
            f"are missing: {_some(missing)}. Download the model again; files that are already there are kept."
        )
    tensors = [info for file in sorted(set(weight_map.values())) for info in read_header(folder / file)]
    stored: dict[str, str] = {}
    for info in tensors:
        if info.name in stored:
            raise ModelError(
                f"{info.name} stands in two shards, {stored[info.name]} and {info.file}, and nobody can tell which is "
                "meant. The folder mixes files of different downloads: download the model again into an empty one."
            )
        stored[info.name] = info.file
    misplaced = sorted(name for name, file in weight_map.items() if stored.get(name) != file)
    if misplaced:
        raise ModelError(
            f"{folder / INDEX_FILE} places {_some(misplaced)} in a shard that does not hold it. Index and "
            "shards come from different versions of the model: download it again into an empty folder."
        )
    return tuple(info for info in tensors if info.name in weight_map)


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors that one safetensors file declares, after checking that the file can hold them.

    Raises:
        ModelError: the file is cut off, damaged, or not safetensors; names expected and actual bytes.
    """
    num_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ModelError(
                f"{path} is a git-lfs pointer, not the weights themselves. Run `git lfs pull` in that "
                "folder, or download the model with `hf download`."
            )
        if len(start) < 8:
            raise _truncated(path, 8, num_file_bytes)
        (num_header_bytes,) = struct.unpack("<Q", start)
        if num_header_bytes > MAX_HEADER_BYTES:
            raise _damaged(path, f"its header claims {num_header_bytes} bytes")
        if 8 + num_header_bytes > num_file_bytes:
            raise _truncated(path, 8 + num_header_bytes, num_file_bytes)
        raw = file.read(num_header_bytes)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [(name, _offsets(entry), entry) for name, entry in header.items()]
        tensors = [_tensor_info(path, *entry) for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    num_data_bytes = 0
    for (begin, end), name in sorted((offsets, name) for name, offsets, _ in entries):
        if begin != num_data_bytes:
            raise _damaged(
                path, f"{name} begins at byte {begin} of the data, and what is before ends at {num_data_bytes}"
            )
        num_data_bytes = end
    num_expected_bytes = 8 + num_header_bytes + num_data_bytes
    if num_file_bytes < num_expected_bytes:
        raise _truncated(path, num_expected_bytes, num_file_bytes)
    if num_file_bytes > num_expected_bytes:
        raise _damaged(path, f"expected {num_expected_bytes} bytes but it has {num_file_bytes}")
    return tensors


def refuse_pickle(file_names: Iterable[str], where: str) -> None:
    """Raise `ModelError` if there are pickled weights among `file_names`."""
    pickles = sorted(name for name in file_names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        raise ModelError(
            f"{where} holds its weights as pickles only ({_some(pickles)}). Unpickling can run any code, so "
            "such a checkpoint is refused; safetensors is expected. If you trust its author, convert it "
            "once, in a place that you can afford to lose: `AutoModelForCausalLM.from_pretrained(MODEL)"
            ".save_pretrained(FOLDER)`, and save the tokenizer beside it."
        )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, "it is not JSON with a weight_map") from error
    outside = sorted(str(file) for file in files if not isinstance(file, str) or Path(file).name != file)
    if outside:
        raise _damaged(path, f"it points outside its folder ({_some(outside)})")
    return weight_map


def _offsets(entry: dict[str, Any]) -> tuple[int, int]:
    start, end = entry["data_offsets"]
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start <= end):
        raise ValueError(f"data_offsets {start}..{end}")
    return start, end


def _tensor_info(path: Path, name: str, offsets: tuple[int, int], entry: dict[str, Any]) -> TensorInfo:
    dtype, shape, size_bytes = entry["dtype"], tuple(entry["shape"]), offsets[1] - offsets[0]
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f"{name} has the shape {list(shape)}")
    if dtype in DTYPE_BITS and math.prod(shape) * DTYPE_BITS[dtype] != size_bytes * 8:
        raise ValueError(f"{name} is {dtype} {list(shape)} but has {size_bytes} bytes")
    return TensorInfo(name=name, file=path.name, dtype=dtype, shape=shape, size_bytes=size_bytes)


def _truncated(path: Path, num_expected_bytes: int, num_actual_bytes: int) -> ModelError:
    return ModelError(
        f"{path} is truncated: expected {num_expected_bytes} bytes but it has {num_actual_bytes}. "
        "The download was cut off: delete this file and download the model again."
    )


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is damaged: {what}. Delete this file and download the model again.")


def _some(names: list[str], num_shown: int = 3) -> str:
    shown = ", ".join(names[:num_shown])
    return shown if len(names) <= num_shown else f"{shown} and {len(names) - num_shown} more"
