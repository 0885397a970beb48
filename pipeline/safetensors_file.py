"""A safetensors file whose exact size is known before any tensor exists, written a tensor at a time.

    8 bytes N, little endian | N bytes of JSON {tensor: {dtype, shape, data_offsets}}, padded with spaces | data

The safetensors library serializes from tensors in memory; planning needs the size without them, and a large
model needs them one by one. Files read back through the library (tested).
"""

import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Of the data alone."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsFile:
    """The layout of one file: its tensors in order of falling element size, so that each is aligned."""

    tensors: tuple[TensorSpec, ...]

    @staticmethod
    def of(tensors: Iterable[TensorSpec]) -> "SafetensorsFile":
        """A file with these tensors."""
        return SafetensorsFile(tuple(sorted(tensors, key=lambda spec: (-spec.dtype.itemsize, spec.name))))

    @property
    def header(self) -> bytes:
        """Length and JSON, padded to a multiple of 8 bytes."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for spec in self.tensors:
            end = start + spec.size_bytes
            entries[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def size_bytes(self) -> int:
        """Exactly what `write` writes."""
        return len(self.header) + sum(spec.size_bytes for spec in self.tensors)

    def write(self, path: Path, read: Callable[[str], Tensor]) -> None:
        """Write the file; `read` gives each tensor by name when its turn comes.

        Raises:
            ValueError: a tensor differs from its spec.
        """
        with path.open("wb") as file:
            file.write(self.header)
            for spec in self.tensors:
                tensor = read(spec.name)
                if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                    raise ValueError(
                        f"{spec.name} is {tensor.dtype} {list(tensor.shape)}, but {spec.dtype} {list(spec.shape)} "
                        "was planned"
                    )
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def into_shards(tensors: Iterable[TensorSpec], limit_bytes: int) -> list[SafetensorsFile]:
    """Fill files in the given order, each up to `limit_bytes` of data (a larger tensor stands alone)."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if shards[-1] and filled + spec.size_bytes > limit_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.size_bytes
    return [SafetensorsFile.of(shard) for shard in shards]
