"""The main job on a CUDA device, beside the same on the CPU. Run with `pytest -m gpu`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.compress import compress
from pipeline.decompose import QuantizeMatrix
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.progress import SILENT
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.spread_gpus import over_gpus
from pipeline.stages import StageLog
from pipeline.statistics import Statistics
from registry import Registry
from tests.models import save_model
from tests.pipeline.small import SMALL
from tests.pipeline.tiny_packed import original_llama

pytestmark = pytest.mark.gpu
BEST: dict[str, Any] = SMALL | {
    "budget": "3bpw",
    "candidates": ("trellis2", "trellis3", "lloyd4-g32-s4"),
    "factor_bits": (4,),
    "num_samples": 8,
    "recover": True,
    "recover_samples": 8,
    "recover_steps": 20,
}


@pytest.fixture(scope="module")
def loud_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer) -> Path:
    """Its predictions depend on its weights, so that there is something to recover."""
    return save_model(original_llama().to(torch.bfloat16), tmp_path_factory.mktemp("loud"), tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("metric", ["fisher", "input", "guided", "kronecker", "sequence"])
def test_statistics_are_those_of_the_cpu(loud_model_dir: Path, tmp_path: Path, metric: str) -> None:
    registry, model = Registry(tmp_path), open_model(str(loud_model_dir))
    recipe = Recipe.of(model=str(loud_model_dir), **(BEST | {"sensitivity": metric}))
    found = []
    for device in ("cpu", "cuda"):
        run = Run.prepare(recipe, registry, device=device, resume=True, log=StageLog(), progress=SILENT)
        artifact = run.statistics()
        assert artifact is not None
        found.append(Statistics.open(lambda name, artifact=artifact: registry.path(artifact, name)))
    for matrix in model.matrices:
        ours, theirs = (statistics.of(matrix) for statistics in found)
        for name, value in vars(ours).items():
            if value is not None:
                other = getattr(theirs, name)
                assert torch.linalg.norm(other - value) <= 0.02 * torch.linalg.norm(value), (matrix.name, name)


def test_compress_from_end_to_end(loud_model_dir: Path, tmp_path: Path) -> None:
    recipe = Recipe.of(model=str(loud_model_dir), **BEST)
    done = compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out", device="cuda")
    assert done.evaluation is not None
    assert done.recovery is not None
    assert done.recovery.best_kl <= done.recovery.start_kl
    tokens = torch.arange(24)[None]
    on_gpu = load_packed(tmp_path / "out", "cuda")(tokens.cuda()).logits.float().cpu()
    on_cpu = load_packed(tmp_path / "out", "cpu")(tokens).logits
    error = torch.linalg.norm(on_gpu - on_cpu) / torch.linalg.norm(on_cpu)
    assert error < 0.03  # bfloat16 there, float32 here


def test_matrices_in_streams_are_those_one_after_the_other(
    loud_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.of(model=str(loud_model_dir), **(BEST | {"sensitivity": "kronecker"}))
    registry, model = Registry(tmp_path / "registry"), open_model(str(loud_model_dir))
    run = Run.prepare(recipe, registry, device="cpu", resume=True, log=StageLog(), progress=SILENT)
    artifact = run.statistics()
    assert artifact is not None
    learnt = Statistics.open(lambda name: registry.path(artifact, name))
    labels = {matrix.module: ("trellis2-l8", "lloyd4-g32-s4")[i % 2] for i, matrix in enumerate(model.matrices)}
    found = []
    for streams in (1, 4):
        monkeypatch.setattr("pipeline.spread_gpus.STREAMS", streams)
        task = QuantizeMatrix(model, labels, learnt, tmp_path / str(streams), "cuda")
        task.folder.mkdir()
        list(over_gpus(task, model.matrices))
        found.append({path.name: path.read_bytes() for path in task.folder.iterdir()})
    assert len(found[0]) == len(model.matrices)
    assert found[0] == found[1]
