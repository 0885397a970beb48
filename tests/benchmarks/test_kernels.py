"""`make bench-kernels` without a GPU: one sentence, or a dry run that finds wrong results."""

import pytest
import torch

from benchmarks import kernels
from quantizers.kernels import reference

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_dry_run_checks_every_product(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.main(["--dry-run"])
    out = capsys.readouterr().out
    assert "18 products are right" in out
    assert "nothing was measured" in out


def test_the_dry_run_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.product
    monkeypatch.setattr(reference, "product", lambda x, weight, factors: 1.1 * right(x, weight, factors))
    with pytest.raises(SystemExit, match="5x70 at 2 bits, 1 rows: wrong by"):
        kernels.main(["--dry-run"])


@without_gpu
@pytest.mark.parametrize("arguments", [[], ["--tune"]])
def test_without_a_gpu_it_says_so_and_fails(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kernels.main(arguments)
    assert ended.value.code == kernels.NO_GPU


def test_random_weights_are_what_a_checkpoint_would_have() -> None:
    weight = kernels.random_weight((5, 300), 3, "cpu")
    assert weight.planes[0].shape == (5, 2, 1, 16)
    assert kernels.weight_bytes(weight) == 5 * 2 * 96 + 5 * 5 + 4
    codes = torch.cat([plane.flatten() for plane in weight.planes])
    assert len(codes.unique()) > 50
