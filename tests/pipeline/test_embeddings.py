"""Embeddings and heads packed on request, from the recipe to the loaded folder."""

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.allocation import Plan
from pipeline.audit import fixed_answer
from pipeline.compress import Compressed, compress
from pipeline.embeddings import planned_embeddings
from pipeline.errors import BudgetError, CheckpointError, RecipeError
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.planned_tensors import check_planned
from pipeline.planning import make_plan
from pipeline.recipe import Recipe
from quantizers import LloydMax, quantizer_from_label
from quantizers.embedding import PackedRows, QuantizedEmbedding, QuantizedHead, TiedEmbedding, TiedHead
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
    model = save_model(build_causal(model_type), folder / "model", dtype=torch.float32)
    recipe = Recipe.of(model=str(model), **(SMALL | QUICK | settings))
    return recipe, compress(recipe, Registry(folder / "registry"), folder / "out")


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


def test_what_is_tied_stays_tied(tmp_path: Path) -> None:
    _, done = compressed("t5", tmp_path)
    network = load_packed(done.folder)
    kinds = {name: type(network.get_submodule(name)) for name in ("shared", "encoder.embed_tokens", "lm_head")}
    assert kinds == {"shared": QuantizedEmbedding, "encoder.embed_tokens": TiedEmbedding, "lm_head": TiedHead}
    network.tie_weights()
    assert isinstance(network.lm_head, TiedHead)
    network.save_pretrained(tmp_path / "again")
    assert torch.equal(fixed_answer(load_packed_anywhere(tmp_path / "again", done.folder)), fixed_answer(network))


def load_packed_anywhere(folder: Path, original: Path) -> torch.nn.Module:
    (folder / "plan.json").write_bytes((original / "plan.json").read_bytes())
    return load_packed(folder)


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
    from pipeline.audit import load_checked

    with pytest.raises(CheckpointError, match=r"missing keys: .*model\.embed_tokens\.weight"):
        load_checked(done.folder)


@pytest.mark.parametrize("label", ["trellis3", "int4", "lloyd4-r2", "kmeans3", "e8p2"])
def test_a_quantizer_whose_rows_cannot_be_read_alone_is_refused(label: str, tiny_model_dir: Path) -> None:
    with pytest.raises(RecipeError, match=f"cannot be packed with {label}.*lloyd6-g64-s6"):
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
