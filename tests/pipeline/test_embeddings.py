"""Embeddings and heads packed on request, from the recipe to the loaded folder."""

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertForMaskedLM

from pipeline.allocation import Plan
from pipeline.audit import fixed_answer, load_checked
from pipeline.compress import Compressed, compress
from pipeline.disk_space import checkpoint_disk_bytes
from pipeline.display import add_run_rows, new_table
from pipeline.embedding_steps import head_curvature
from pipeline.embeddings import planned_embeddings
from pipeline.errors import BudgetError, CheckpointError, DiskSpaceError, RecipeError
from pipeline.forecast import forecast
from pipeline.head_curvature import CURVATURE_FILE, read_curvature
from pipeline.model import open_model
from pipeline.packed import load_packed, unpack
from pipeline.planned_tensors import check_planned
from pipeline.planning import make_plan
from pipeline.progress import SILENT, Silent
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import StageLog
from pipeline.sweep import compress_budgets
from quantizers import LayerStatistics, LloydMax, quantizer_from_label, weighted_error
from quantizers.embedding import PackedRows, QuantizedEmbedding, QuantizedHead, TiedEmbedding, TiedHead
from quantizers.embedding_swap import embedding_scale
from registry import Registry
from tests.architectures import build_causal
from tests.models import save_model
from tests.pipeline.small import SMALL

pytestmark = pytest.mark.usefixtures("quick")
LABEL = "lloyd4-g32-s4"
QUICK = {"ranks": (0,), "sensitivity": "none", "candidates": ("lloyd4-g32-s6",), "eval_windows": 0, "embeddings": LABEL}
# tied; not tied; stored without a prefix; scaled; head with a bias; of another width; tied with a bias; four that
# share one weight, plain and scaled; a vision-language model's; experts
ARCHITECTURES = ["qwen2", "llama", "gpt2", "gemma3_text", "phi", "opt", "bert", "t5", "bart", "gemma3", "mixtral"]


def compressed(model_type: str, folder: Path, **settings: object) -> tuple[Recipe, Compressed]:
    network = build_causal(model_type)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):  # zeros, of which nobody would miss one
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    recipe = Recipe.of(
        model=str(save_model(network, folder / "model", dtype=torch.float32)), **(SMALL | QUICK | settings)
    )
    return recipe, compress(recipe, Registry(folder / "registry"), folder / "out")


def opened(recipe: Recipe, folder: Path) -> Run:
    registry = Registry(folder / "registry")
    return Run.open(recipe, registry, device="cpu", resume=True, log=StageLog(), progress=SILENT)


@torch.no_grad()
def dense_answer(recipe: Recipe, plan: Plan) -> torch.Tensor:
    """Of the original with each planned weight replaced by its quantized values."""
    model = open_model(recipe.model)
    network = model.load()
    weights = {matrix.name: (model.weight(matrix), matrix.transposed) for matrix in model.matrices}
    weights |= {each.name: (model.tensor(each.name).float(), False) for each in model.embeddings}
    for name, (weight, is_turned) in weights.items():
        values = quantizer_from_label(plan.packed[name.removesuffix(".weight")].label).quantize(weight).dequantize()
        network.get_parameter(name).copy_(values.T if is_turned else values)
    return fixed_answer(network)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_they_answer_like_dense_ones_with_the_quantized_values(model_type: str, tmp_path: Path) -> None:
    recipe, done = compressed(model_type, tmp_path)
    network = load_packed(done.folder)
    names = {each.module for each in open_model(recipe.model).embeddings}
    assert names
    assert set(done.plan.embeddings) == names
    assert names == {name for name, module in network.named_modules() if isinstance(module, PackedRows)}
    torch.testing.assert_close(fixed_answer(network), dense_answer(recipe, done.plan), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_what_gives_logits_is_rounded_under_what_the_head_reads(model_type: str, tmp_path: Path) -> None:
    recipe, done = compressed(model_type, tmp_path, sensitivity="input")
    model, network = open_model(recipe.model), load_packed(done.folder)
    run = opened(recipe, tmp_path)
    found = head_curvature(run)
    assert found is not None
    metric = LayerStatistics(input_curvature=read_curvature(run.registry.path(found, CURVATURE_FILE)))
    for each in model.embeddings:
        weight, values = model.tensor(each.name).float(), network.get_submodule(each.module).quantized().dequantize()
        plain = LloydMax(4, 32, 4).quantize(weight).dequantize()
        if each.gives_logits:
            fed_back = LloydMax(4, 32, 4).quantize(weight, metric).dequantize()
            assert weighted_error(weight - values, metric) == pytest.approx(
                weighted_error(weight - fed_back, metric), rel=0.02
            )
            assert weighted_error(weight - values, metric) < 0.9 * weighted_error(weight - plain, metric)
        else:
            assert torch.equal(values, plain)
    assert {each.gives_logits for each in model.embeddings} == ({True} if model_type == "qwen2" else {True, False})


def test_an_encoder_has_no_head_that_reads(tmp_path: Path) -> None:
    recipe, done = compressed("bert", tmp_path, sensitivity="input")
    assert head_curvature(opened(recipe, tmp_path)) is None
    torch.testing.assert_close(
        load_packed(done.folder).get_input_embeddings().weight,
        LloydMax(4, 32, 4).quantize(open_model(recipe.model).load().get_input_embeddings().weight).dequantize(),
    )


def test_what_is_tied_stays_tied(tmp_path: Path) -> None:
    _, done = compressed("t5", tmp_path)
    network = load_packed(done.folder)
    kinds = {name: type(network.get_submodule(name)) for name in ("shared", "encoder.embed_tokens", "lm_head")}
    assert kinds == {"shared": QuantizedEmbedding, "encoder.embed_tokens": TiedEmbedding, "lm_head": TiedHead}
    network.tie_weights()
    assert isinstance(network.lm_head, TiedHead)
    assert isinstance(network.encoder.embed_tokens, TiedEmbedding)


@pytest.mark.parametrize("model_type", ["t5", "phi", "qwen2"])
def test_saved_again_it_is_the_same_model(model_type: str, tmp_path: Path) -> None:
    _, done = compressed(model_type, tmp_path)
    network = load_packed(done.folder)
    network.save_pretrained(tmp_path / "again")
    skipped = json.loads((done.folder / "plan.json").read_text())["skipped"]
    assert skipped.keys().isdisjoint(f"{module}.weight" for module in done.plan.embeddings)
    (tmp_path / "again" / "plan.json").write_bytes((done.folder / "plan.json").read_bytes())
    assert torch.equal(fixed_answer(load_packed(tmp_path / "again")), fixed_answer(network))


def test_an_encoders_head_for_masked_words_reads_the_packed_table(tmp_path: Path) -> None:
    recipe, done = compressed("bert", tmp_path)
    tokens = torch.arange(12)[None]
    packed, dense = (BertForMaskedLM.from_pretrained(folder).eval() for folder in (done.folder, recipe.model))
    weight = dense.bert.embeddings.word_embeddings.weight
    values = LloydMax(4, 32, 4).quantize(weight).dequantize()
    with torch.no_grad():
        weight.copy_(values)
        hidden = packed.cls.predictions.transform(packed.bert(tokens).last_hidden_state)
        expected = torch.nn.functional.linear(hidden, values, dense.cls.predictions.bias)
        torch.testing.assert_close(packed(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")  # with the tied bias that is not packed
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_a_class_without_the_head_loads_the_rest(tmp_path: Path) -> None:
    _, done = compressed("phi", tmp_path)
    assert json.loads((done.folder / "config.json").read_text())["quantization_config"]["heads"] == ["lm_head"]
    whole = load_packed(done.folder)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        for loads in (AutoModel, AutoModelForSequenceClassification):
            base = loads.from_pretrained(done.folder, dtype=torch.float32, pad_token_id=2).eval().base_model
            assert torch.equal(base(tokens).last_hidden_state, whole.model(tokens).last_hidden_state)


def test_in_bfloat16_scales_keep_their_precision(tmp_path: Path) -> None:
    _, done = compressed("gemma3_text", tmp_path)
    network = load_packed(done.folder, dtype=torch.bfloat16)
    rows = network.get_input_embeddings()
    assert rows(torch.tensor([5])).dtype == torch.bfloat16
    assert torch.equal(rows.quantized().dequantize(), load_packed(done.folder).get_input_embeddings().weight)
    answer, exact = fixed_answer(network), fixed_answer(load_packed(done.folder))
    assert (answer - exact).norm() < 0.05 * exact.norm()


def test_a_head_of_its_own_is_packed_too(tmp_path: Path) -> None:
    _, done = compressed("phi", tmp_path)
    head = load_packed(done.folder).lm_head
    assert isinstance(head, QuantizedHead)
    assert head.bias is not None


def test_every_bit_is_counted_and_checked(tmp_path: Path) -> None:
    recipe, done = compressed("qwen2", tmp_path)
    registry = Registry(tmp_path / "registry")
    planned = done.plan.embeddings["model.embed_tokens"]
    assert planned.size_bits == LloydMax(4, 32, 4).size_bits((384, 32))
    assert done.plan.num_params == sum(math.prod(m.shape) for m in open_model(recipe.model).matrices)
    assert check_planned(registry, done.version) == len(done.plan.matrices) + 1
    content = json.loads((done.folder / "report" / "report.json").read_text())
    assert content["sizes"]["embeddings"] == {"original": 4 * 384 * 32, "compressed": planned.size_bits // 8}
    assert content["sizes"]["folder"]["compressed"] == sum(
        content["sizes"][part]["compressed"] for part in ("matrices", "embeddings", "kept", "around")
    )
    assert "model.embed_tokens.weight" not in [name for row in content["skipped"] for name in row["names"]]
    assert f"--embeddings {LABEL}" in content["command"]
    assert f"<code>{LABEL}</code>" in (done.folder / "report" / "index.html").read_text()


def test_a_budget_in_bytes_that_needs_them(tmp_path: Path) -> None:
    folder = save_model(build_causal("qwen2"), tmp_path / "model", dtype=torch.float32)
    small = {"candidates": ("lloyd2-g32-s4", "lloyd4-g32-s4"), "ranks": (0,), "sensitivity": "none"}
    recipe = Recipe.of(model=str(folder), **(SMALL | QUICK | small))
    smallest = make_plan(recipe.model_copy(update={"budget": "2.7bpw"}), tmp_path / "registry").size_bytes
    tight = recipe.model_copy(update={"budget": f"{(smallest + 2000) / 1e6:.6f}MB"})
    assert make_plan(tight, tmp_path / "registry").size_bytes <= smallest + 2000
    with pytest.raises(BudgetError, match="or pack the embeddings"):
        make_plan(tight.model_copy(update={"embeddings": None}), tmp_path / "registry")


def test_a_folder_without_them_is_refused(tmp_path: Path) -> None:
    _, done = compressed("qwen2", tmp_path)
    config = json.loads((done.folder / "config.json").read_text())
    del config["quantization_config"]["matrices"]["model.embed_tokens"]
    (done.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"missing keys: .*model\.embed_tokens\.weight"):
        load_checked(done.folder)


@pytest.mark.parametrize("label", ["trellis3", "int4", "lloyd4-r2", "kmeans3", "e8p2"])
def test_a_quantizer_whose_rows_cannot_be_read_alone_is_refused(label: str, tiny_model_dir: Path) -> None:
    with pytest.raises(RecipeError, match=f"cannot be packed with {label}.*lloyd5-g64-s6"):
        planned_embeddings(open_model(str(tiny_model_dir)), label)


def test_an_unknown_quantizer_is_named(tiny_model_dir: Path) -> None:
    with pytest.raises(RecipeError, match="'lloyd9' cannot be offered"):
        planned_embeddings(open_model(str(tiny_model_dir)), "lloyd9")


def test_recovery_keeps_them(tmp_path: Path) -> None:
    settings = {"recover": True, "recover_samples": 4, "recover_steps": 2, "recover_train": ("norms", "scales")}
    recipe, done = compressed("qwen2", tmp_path, **settings)
    network = load_packed(done.folder)
    stored = open_model(recipe.model).tensor("model.embed_tokens.weight").float()
    expected = LloydMax(4, 32, 4).quantize(stored).dequantize()
    assert torch.equal(network.get_submodule("model.embed_tokens").weight, expected)


def test_the_sample_of_the_report_has_dense_heads(tmp_path: Path) -> None:
    _, done = compressed("qwen2", tmp_path, eval_windows=2)
    network, expected = load_packed(done.folder), fixed_answer(load_packed(done.folder))
    unpack(network)
    assert type(network.lm_head) is torch.nn.Linear
    torch.testing.assert_close(fixed_answer(network), expected)


def test_they_are_packed_once_for_all_budgets(tmp_path: Path) -> None:
    said: list[str] = []

    class Lines(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    model = save_model(build_causal("qwen2"), tmp_path / "model", dtype=torch.float32)
    small = {"candidates": ("lloyd2-g32-s4", "lloyd4-g32-s4")}
    recipes = [Recipe.of(model=str(model), **(SMALL | QUICK | small | {"budget": each})) for each in ("3bpw", "4bpw")]
    sweep = compress_budgets(recipes, Registry(tmp_path / "registry"), tmp_path / "out", progress=Lines())
    assert len([line for line in said if line.startswith("Packing model.embed_tokens")]) == 1
    tables = [load_packed(done.folder).get_input_embeddings().weight for done in sweep.results]
    assert torch.equal(*tables)


@pytest.mark.parametrize("is_equal", [True, False])
def test_a_head_that_is_stored_beside_what_it_is_tied_to_is_refused(is_equal: bool, tmp_path: Path) -> None:
    folder = save_model(build_causal("qwen2"), tmp_path / "model", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (not is_equal)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"no embeddings that can be packed.*once more as a head of its own"):
        planned_embeddings(open_model(str(folder)), LABEL)


def test_a_table_that_does_more_than_to_look_up_is_left_alone() -> None:
    class Odd(torch.nn.Embedding):
        embed_scale = 2.0

        def __init__(self) -> None:
            super().__init__(4, 2)
            self.extra = torch.nn.Parameter(torch.zeros(2))

    assert embedding_scale(Odd()) is None
    assert embedding_scale(torch.nn.Embedding(4, 2, max_norm=1.0)) is None
    assert embedding_scale(torch.nn.Embedding(4, 2)) == (1.0, False)


def test_the_forecast_and_the_disk_count_them_and_the_start_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(build_causal("qwen2"), tmp_path / "model", dtype=torch.float32)
    plain, packed = (
        opened(Recipe.of(model=str(folder), **(SMALL | QUICK | {"embeddings": label})), tmp_path)
        for label in (None, LABEL)
    )
    saved = 4 * 384 * 32 - LloydMax(4, 32, 4).size_bits((384, 32)) // 8
    assert packed.sizes.saved_bytes(packed.sizes.embedding_sets[0]) == saved
    table_bytes = LloydMax(4, 32, 4).size_bits((384, 32)) // 8  # in the checkpoint, its copy, by itself, with matrices
    assert checkpoint_disk_bytes(plain) - checkpoint_disk_bytes(packed) == 2 * saved - 2 * table_bytes
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**9))  # or it grows from one to the other
    monkeypatch.setattr("pipeline.forecast.psutil.Process", lambda: memory)
    checkpoints = [next(each for each in forecast(run) if each.name == "checkpoint") for run in (plain, packed)]
    assert checkpoints[0].memory_bytes - checkpoints[1].memory_bytes >= saved
    said = []
    for run in (plain, packed):
        table = new_table(title="")
        add_run_rows(table, run)
        said.append(dict(zip(*(column.cells for column in table.columns), strict=True)))
    assert said[0]["embeddings"] == "49.15 kB, as they are; --embeddings lloyd5-g64-s6 packs them"
    assert said[1]["packed too"].startswith(f"model.embed_tokens as {LABEL}, ")


def test_a_disk_that_fills_while_they_are_packed_is_one_paragraph(tmp_path: Path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pipeline.embeddings.replace_file", full)
    with pytest.raises(DiskSpaceError):
        compressed("qwen2", tmp_path)
