"""`benchmarks.kernels` without a GPU: one sentence, or a dry run that finds wrong results."""

import pytest
import torch

from benchmarks import kernels
from quantizers.kernels import reference
from quantizers.kernels.configs import CONFIGS, DEFAULT
from quantizers.kernels.trellis_weight import TrellisWeight

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_dry_run_checks_every_product(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--dry-run"])
    out = capsys.readouterr().out
    assert "48 products are right" in out
    assert "nothing was measured" in out


def test_the_dry_run_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.dequantize_trellis
    monkeypatch.setattr(reference, "dequantize_trellis", lambda weight, dtype: 1.1 * right(weight, dtype))
    with pytest.raises(SystemExit, match="trellis, 5x70 at 2 bits, 1 rows: wrong by"):
        kernels.main(["--dry-run"])


@without_gpu
@pytest.mark.parametrize("arguments", [[], ["--tune"]])
def test_without_a_gpu_it_says_so_and_fails(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kernels.main(arguments)
    assert ended.value.code == kernels.NO_GPU


def test_random_weights_are_what_a_checkpoint_would_have() -> None:
    weight = kernels.random_levels((5, 300), 3, "cpu")
    assert weight.planes[0].shape == (5, 2, 1, 16)
    assert kernels.weight_bytes(weight) == 5 * 2 * 96 + 5 * 5 + 4
    codes = torch.cat([plane.flatten() for plane in weight.planes])
    assert len(codes.unique()) > 50
    trellis = kernels.random_trellis((5, 300), 3, "cpu")
    assert kernels.weight_bytes(trellis) == 19 * 96
    assert len(trellis.words.unique()) > 50


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_copies_share_no_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "num_copies", lambda size_bytes: 2)
    weight = kernels.KINDS[kind]((5, 300), 3, "cpu")
    one, other = kernels.copies_of(weight)
    before = one.dense(torch.float32)
    assert torch.equal(before, weight.dense(torch.float32))
    (other.words if isinstance(other, TrellisWeight) else other.planes[0]).zero_()
    assert torch.equal(one.dense(torch.float32), before)
    assert not torch.equal(other.dense(torch.float32), before)


def test_what_is_tuned_is_every_kernel_of_the_table_and_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "num_copies", lambda size_bytes: 1)
    monkeypatch.setattr(kernels, "TUNED_SHAPE", (32, 256))
    found = kernels.tunable("cpu")
    assert found.keys() == CONFIGS[DEFAULT].keys()
    for tiles, run in found.values():
        assert tiles
        assert run() is not None
