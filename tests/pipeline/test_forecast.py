"""What a run will take, before it runs: close to what it then takes, and refused where there is not so much."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline import forecast as forecasting
from pipeline import memory_check, working_memory
from pipeline import model_memory as memory_of_model
from pipeline.base_logits import cache_bytes
from pipeline.compress import compress
from pipeline.curvature_sums import Metric, sums_of
from pipeline.errors import MemoryShortError
from pipeline.evaluate import MOST_LOGITS_BYTES, batch_of
from pipeline.forecast import StageForecast, forecast
from pipeline.layered import LayeredNetwork
from pipeline.memory_check import check_memory
from pipeline.model import Model, open_model
from pipeline.model_memory import model_memory
from pipeline.planning import make_plan
from pipeline.progress import SILENT
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.spread import num_workers
from pipeline.spread_gpus import SLOT_BYTES, STREAMS
from pipeline.stages import StageLog
from pipeline.sweep import compress_budgets
from pipeline.tail import _kept_bytes, tail_room, tail_within
from pipeline.working_memory import LOOPS_BYTES, PROCESS_BYTES, costs_bytes, quantize_bytes
from registry import Registry
from tests.architectures import build_causal
from tests.models import save_model
from tests.pipeline.small import SMALL

GIB = 2**30
# tied and untied, `Conv1D`, outside projections, experts in several forms, images, encoders, two kinds of blocks
UNLIKE = ("llama", "qwen2", "gpt2", "opt", "gemma2", "mixtral", "deepseek_v3", "gpt_oss", "llava", "modernbert", "t5")


def opened(model_dir: Path, registry: Registry, **settings) -> Run:
    recipe = Recipe.of(model=str(model_dir), **(SMALL | settings))
    return Run.prepare(recipe, registry, device="cpu", resume=True, log=StageLog(), progress=SILENT)


def by_name(stages: tuple[StageForecast, ...]) -> dict[str, StageForecast]:
    return {stage.name: stage for stage in stages}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Set how much memory there seems to be."""

    def set_free(nbytes: int) -> None:
        for module in (forecasting, memory_check):
            monkeypatch.setattr(module, "free_bytes", lambda device: nbytes)

    return set_free


@pytest.mark.parametrize("model_type", UNLIKE)
def test_weights_of_blocks_are_counted_from_headers(
    model_type: str, tmp_path: Path, tiny_tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model", tokenizer=tiny_tokenizer)))
    found = model_memory(model)
    network = model.load()
    assert found.weight_bytes <= 4 * sum(parameter.numel() for parameter in network.parameters())
    assert found.kept_bytes_a_token > 0
    assert bool(found.block_bytes) == (model_type != "t5")
    if found.block_bytes:
        network = LayeredNetwork(model, "cpu")
        expected = [network.weight_bytes(index) for index in range(network.num_blocks)]
        assert list(found.block_bytes) == pytest.approx(expected, abs=64)  # a saved buffer is no weight
        assert not network.is_whole


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "opt", "phi3"])
def test_what_autograd_keeps_is_foreseen(model_type: str, tmp_path: Path, tiny_tokenizer) -> None:
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model", tokenizer=tiny_tokenizer)))
    window = torch.arange(64)[None]
    kept = _kept_bytes(LayeredNetwork(model, "cpu"), 1, window)
    assert 0.6 * kept <= 64 * model_memory(model).kept_bytes_a_token <= 1.6 * kept


@pytest.mark.parametrize("fault", ["in place", "no pass", "no embeddings"])
def test_a_network_that_cannot_be_passed_without_values_is_still_forecast(
    fault: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some are written: CTRL multiplies its embeddings in place, and a model's own code may do anything."""
    model = open_model(str(tiny_model_dir))
    usual, real = model_memory(model), memory_of_model._kept_bytes_a_token

    def with_fault(skeleton, names) -> float:
        forward = skeleton.model.forward

        def in_place(input_ids=None, **options):
            embeds = skeleton.get_input_embeddings()(input_ids)
            embeds *= 2
            return forward(**options | {"inputs_embeds": embeds})

        def refuse(*args, **options):
            raise NotImplementedError

        if fault == "in place":
            skeleton.model.forward = in_place
        else:
            setattr(skeleton, "get_input_embeddings" if fault == "no embeddings" else "forward", refuse)
        return real(skeleton, names)

    monkeypatch.setattr(memory_of_model, "_kept_bytes_a_token", with_fault)
    found = model_memory(model)
    assert found.block_bytes == usual.block_bytes
    assert (found.kept_bytes_a_token == pytest.approx(usual.kept_bytes_a_token, rel=0.05)) == (fault == "in place")
    assert found.kept_bytes_a_token > 0


def test_all_stages_to_come_are_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    run = opened(tiny_model_dir, Registry(tmp_path), recover=True, recover_samples=4)
    stages = forecast(run)
    names = ["statistics", "costs", "plan", "decompose", "recover", "checkpoint", "evaluate", "report"]
    assert [stage.name for stage in stages] == names
    assert all(stage.seconds > 0 and 0 < stage.memory_bytes <= stage.total_bytes for stage in stages)
    assert not any(stage.device_bytes for stage in stages)


def test_what_is_in_the_registry_is_no_work(tiny_model_dir: Path, tmp_path: Path) -> None:
    run = opened(tiny_model_dir, Registry(tmp_path))
    run.costs(run.statistics())
    assert [stage.name for stage in forecast(run)][:2] == ["plan", "decompose"]
    assert [stage.name for stage in forecast(dataclasses.replace(run, resume=False))][:2] == ["statistics", "costs"]


@pytest.mark.parametrize("metric", ["fisher", "factored", "input", "kl", "guided", "kronecker", "sequence"])
def test_more_text_at_once_takes_more(metric: Metric, tiny_model_dir: Path, tmp_path: Path) -> None:
    run = opened(tiny_model_dir, Registry(tmp_path), sensitivity=metric, seq_len=32)
    longer = opened(tiny_model_dir, Registry(tmp_path), sensitivity=metric, seq_len=64)
    before, after = (forecasting._Facts(each, model_memory(each.model), 0).statistics() for each in (run, longer))
    assert after.memory_bytes > before.memory_bytes
    assert after.seconds > before.seconds


def test_a_large_matrix_takes_what_its_metric_wants() -> None:
    shape = (4096, 11008)
    assert costs_bytes(shape, "factored") == costs_bytes(shape, "fisher") == costs_bytes(shape, None)
    assert costs_bytes(shape, "kronecker") > 2 * costs_bytes(shape, "fisher")
    assert quantize_bytes(shape, "fisher", ["nf4", "nf4-r2"]) > quantize_bytes(shape, "fisher", ["nf4"])
    assert quantize_bytes(shape, "input", ["nf4"]) > quantize_bytes(shape[::-1], "input", ["nf4"])


def test_compiled_loops_take_memory_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_memory, "is_there", lambda: True)
    plain, searching = (quantize_bytes((96, 64), None, [label]) for label in ("nf4", "trellis3-l12-r2"))
    assert searching - plain > LOOPS_BYTES
    monkeypatch.setattr(working_memory, "is_there", lambda: False)
    assert quantize_bytes((96, 64), None, ["trellis3-l12"]) == plain


@pytest.mark.parametrize(("free_gib", "in_processes", "workers"), [(1000, False, 3), (2.5, False, 2), (2.5, True, 1)])
def test_no_more_jobs_than_fit(monkeypatch: pytest.MonkeyPatch, free_gib: float, in_processes, workers: int) -> None:
    monkeypatch.setattr("pipeline.spread.num_cores", lambda: 3)
    assert PROCESS_BYTES < 0.5 * GIB
    assert num_workers([GIB // 2, GIB, 1], in_processes, round(free_gib * GIB)) == workers
    assert num_workers([GIB], in_processes, 0) == 1
    assert num_workers([], in_processes, 0) == 1


def test_the_tail_keeps_within_its_room() -> None:
    assert tail_within(25, [10] * 5) == range(3, 5)
    assert tail_within(30, [10] * 5) == range(2, 5)
    assert tail_within(1, [10] * 5) == range(4, 5)
    assert tail_within(1000, [10] * 5) == range(5)
    assert tail_room(2 * GIB) == GIB
    assert tail_room(1000 * GIB) == 4 * GIB


def test_a_batch_has_as_many_windows_as_logits_fit() -> None:
    assert batch_of(512, 49152) == 4
    assert batch_of(2048, 262144) == 1
    assert 4 * 512 * 151936 * batch_of(512, 151936) <= MOST_LOGITS_BYTES


def test_where_there_is_memory_nothing_is_said(tiny_model_dir: Path, tmp_path: Path, free) -> None:
    free(1000 * GIB)
    run = opened(tiny_model_dir, Registry(tmp_path))
    assert [stage.name for stage in check_memory(run)] == [stage.name for stage in forecast(run)]


def test_what_cannot_fit_is_refused(tiny_model_dir: Path, tmp_path: Path, free) -> None:
    run = opened(tiny_model_dir, Registry(tmp_path))
    free(-GIB)
    with pytest.raises(MemoryShortError, match=r"The stage `statistics` takes about .* No setting makes it fit"):
        check_memory(run)


def test_what_cannot_fit_is_refused_before_weights_are_read(
    tiny_model_dir: Path, tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(model: Model, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Model, "tensor", read)
    free(-GIB)
    recipe = Recipe.of(model=str(tiny_model_dir), **SMALL)
    with pytest.raises(MemoryShortError):
        compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out")
    with pytest.raises(MemoryShortError):
        compress_budgets([recipe], Registry(tmp_path / "registry"), tmp_path / "several")
    with pytest.raises(MemoryShortError):
        make_plan(recipe, tmp_path / "registry", dry_run=True)
    assert not (tmp_path / "out").exists()


def test_the_settings_that_fit_are_named(
    tiny_model_dir: Path, tmp_path: Path, free, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasting, "loss_bytes", lambda num_tokens, vocab_size, is_drawn: num_tokens * 2**22)
    registry = Registry(tmp_path)
    settings = {"sensitivity": "kronecker", "seq_len": 1024, "eval_seq_len": 1024, "num_samples": 2}
    run = opened(tiny_model_dir, registry, **settings)
    most = max(stage.total_bytes for stage in forecast(run))
    shorter = opened(tiny_model_dir, registry, **settings | {"seq_len": 128, "eval_seq_len": 128})
    least = max(stage.total_bytes for stage in forecast(shorter))
    assert least < most
    free((least + most) // 2 - memory_check.psutil.Process().memory_info().rss)
    with pytest.raises(MemoryShortError) as refused:
        check_memory(run)
    seq_len = int(str(refused.value).split("--seq-len ")[1].split()[0])
    assert 128 <= seq_len < 1024
    check_memory(opened(tiny_model_dir, registry, **settings | {"seq_len": seq_len, "eval_seq_len": seq_len}))


def test_answers_that_are_not_kept_want_the_original_beside_the_packed_model(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tiny_model_dir, Registry(tmp_path))
    assert run.texts.evaluation is not None
    kept = by_name(forecast(run))["evaluate"].memory_bytes
    monkeypatch.setattr(forecasting, "LIMIT_BYTES", cache_bytes(run.model.config, run.texts.evaluation.tokens) - 1)
    live = by_name(forecast(run))["evaluate"].memory_bytes
    assert live > kept + model_memory(run.model).weight_bytes


@pytest.mark.parametrize("metric", ["fisher", "factored", "sequence"])
def test_the_gradient_of_a_weight_is_counted(
    metric: Metric, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tiny_model_dir, Registry(tmp_path), sensitivity=metric)
    monkeypatch.setattr(forecasting, "tail_room", lambda free: 0)
    facts = forecasting._Facts(run, model_memory(run.model), 0)
    with_it = facts.statistics().memory_bytes
    monkeypatch.setattr(type(sums_of(metric)), "forms_gradients", False)
    assert with_it - facts.statistics().memory_bytes == 4 * max(matrix.num_params for matrix in run.model.matrices)


def test_blocks_are_decoded_sooner_than_trellises(tiny_model_dir: Path, tmp_path: Path) -> None:
    blocks, trellises = (
        by_name(forecast(opened(tiny_model_dir, Registry(tmp_path), candidates=labels)))
        for labels in (("lloyd3-g32-s4", "lloyd4-g32-s6"), ("lloyd3-g32-s4", "trellis3"))
    )
    for stage in ("checkpoint", "evaluate"):
        assert blocks[stage].seconds < trellises[stage].seconds


def test_on_gpus_so_many_matrices_are_held_at_once_as_fit(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = dataclasses.replace(opened(tiny_model_dir, Registry(tmp_path), sensitivity="kronecker"), device="cuda")
    shapes = [matrix.shape for matrix in run.model.matrices]
    most = SLOT_BYTES + max(quantize_bytes(shape, "kronecker", run.labels) for shape in shapes)
    gpus = [torch.device("cuda", number) for number in range(2)]
    monkeypatch.setattr(forecasting, "gpus_of", lambda device: gpus)
    monkeypatch.setattr("pipeline.stage_seconds.flops", lambda device: 1e12)
    found = []
    for fit in (2, 100):  # matrices on a GPU
        for module in ("pipeline.forecast", "pipeline.spread_gpus", "pipeline.unloaded"):
            monkeypatch.setattr(f"{module}.free_bytes", lambda device, fit=fit: fit * most)
        found.append(by_name(forecast(run))["decompose"])
    assert [stage.device_bytes for stage in found] == [2 * most, STREAMS * most]
