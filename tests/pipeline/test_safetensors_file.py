from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.safetensors_file import SafetensorsFile, TensorSpec, into_shards

TENSORS = {
    "b.norm": torch.randn(7),
    "a.packed": torch.randint(-(2**31), 2**31 - 1, (13,), dtype=torch.int32),
    "c.low": torch.randn(3, 5).to(torch.bfloat16),
    "d.byte": torch.arange(3, dtype=torch.uint8),
    "é": torch.randn(2, 2, dtype=torch.float64),
    "empty": torch.empty(0, 4),
}


def specs() -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def test_the_library_reads_what_is_written_and_the_size_was_known(tmp_path: Path) -> None:
    file = SafetensorsFile.of(specs())
    file.write(tmp_path / "x.safetensors", TENSORS.__getitem__)
    assert (tmp_path / "x.safetensors").stat().st_size == file.size_bytes
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_tensor_that_differs_from_its_spec_is_refused(tmp_path: Path) -> None:
    file = SafetensorsFile.of([TensorSpec("a", torch.float32, (2,))])
    with pytest.raises(ValueError, match="was planned"):
        file.write(tmp_path / "x.safetensors", lambda name: torch.zeros(3))


def test_shards_fill_in_order() -> None:
    tensors = [TensorSpec(name, torch.uint8, (size,)) for name, size in [("a", 6), ("b", 4), ("c", 11), ("d", 1)]]
    shards = into_shards(tensors, limit_bytes=10)
    assert [[spec.name for spec in shard.tensors] for shard in shards] == [["a", "b"], ["c"], ["d"]]
