"""The parts that `make bench-memory` is made of."""

import sys
from pathlib import Path

import pytest

from benchmarks import limited
from benchmarks.limited import run_limited
from benchmarks.llama_shapes import SHAPES, Shape, write_llama
from pipeline.model import open_model

TAKE_A_GIGABYTE = "block = bytearray(2**30); print(len(block))"


def test_a_made_up_llama_is_a_sound_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    shape = Shape(width=32, inner=48, num_layers=3, num_heads=2)
    model = open_model(str(write_llama(tmp_path / "model", shape, tiny_model_dir)))
    assert model.num_params == shape.num_params(model.config.vocab_size)
    assert len(model.matrices) == 7 * 3
    assert len({info.file for info in model.tensors.values()}) == 4
    model.check_finite()


def test_a_made_up_llama_depends_on_its_seed_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    shape = Shape(width=32, inner=48, num_layers=1, num_heads=2)
    made = [
        open_model(str(write_llama(tmp_path / str(number), shape, tiny_model_dir, seed=seed))).digest
        for number, seed in enumerate((0, 0, 1))
    ]
    assert made[0] == made[1] != made[2]


def test_shapes_have_the_parameters_of_their_names() -> None:
    for name, billions in {"1.3B": 1.35, "7B": 6.74, "13B": 13.02}.items():
        assert SHAPES[name].num_params(32_000) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("versions", [limited.VERSIONS, ()], ids=["best way here", "address space"])
def test_a_command_gets_no_more_memory(monkeypatch: pytest.MonkeyPatch, versions: tuple[tuple[Path, str], ...]) -> None:
    monkeypatch.setattr(limited, "VERSIONS", versions)
    command = [sys.executable, "-c", TAKE_A_GIGABYTE]
    enough, _ = run_limited(command, 2**31)
    assert (enough.returncode, enough.stdout) == (0, f"{2**30}\n")
    little, _ = run_limited(command, 2**29)
    assert little.returncode != 0
