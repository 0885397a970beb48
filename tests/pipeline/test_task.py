"""What each kind of model is asked, and that encoders and encoder-decoders go all the way like decoders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from transformers import PreTrainedConfig

from pipeline.auto_classes import known_class
from pipeline.base_logits import base_log_probs
from pipeline.calibration import token_windows
from pipeline.card import render_card
from pipeline.compress import Compressed, compress
from pipeline.errors import CalibrationError, CheckpointError, RecipeError
from pipeline.evaluate import evaluate
from pipeline.generate import stream_text
from pipeline.layered import open_network
from pipeline.model import open_model
from pipeline.packed import load_packed
from pipeline.pareto import write_pareto
from pipeline.progress import SILENT
from pipeline.recipe import Recipe
from pipeline.statistics import Statistics, collect_statistics
from pipeline.task import Continuation, Features, NextToken, auto_class, task_of
from pipeline.texts import Texts
from pipeline.version_facts import VersionFacts, figures_of
from registry import Registry
from tests.architectures import build_causal
from tests.models import build_tokenizer, save_model
from tests.pipeline.small import SMALL

pytestmark = pytest.mark.usefixtures("quick")
KINDS = {
    "BertModel": ("BertConfig", Features, "AutoModel"),
    "BertForMaskedLM": ("BertConfig", Features, "AutoModelForMaskedLM"),
    "BertForPreTraining": ("BertConfig", Features, "AutoModelForPreTraining"),
    "BertLMHeadModel": ("BertConfig", NextToken, "AutoModelForCausalLM"),
    "DistilBertForSequenceClassification": ("DistilBertConfig", Features, "AutoModelForSequenceClassification"),
    "MyOwnBert": ("BertConfig", Features, "AutoModel"),
    "T5ForConditionalGeneration": ("T5Config", Continuation, "AutoModelForSeq2SeqLM"),
    "T5EncoderModel": ("T5Config", Features, "AutoModelForTextEncoding"),
    "LlamaForCausalLM": ("LlamaConfig", NextToken, "AutoModelForCausalLM"),
}


@pytest.mark.parametrize("architecture", KINDS)
def test_the_files_say_what_kind_of_model_it_is(architecture: str) -> None:
    config_class, task, auto = KINDS[architecture]
    config = getattr(transformers, config_class)(architectures=[architecture])
    assert type(task_of(config)) is task
    assert auto_class(config).__name__ == auto


def test_a_bert_that_says_nothing_is_an_encoder() -> None:
    config: PreTrainedConfig = transformers.BertConfig()
    assert isinstance(task_of(config), Features)


def test_an_encoder_decoder_reads_half_and_predicts_half() -> None:
    task, tokens = Continuation(start=9), torch.arange(7)[None]
    inputs = task.inputs(tokens)
    assert inputs["input_ids"].tolist() == [[0, 1, 2]]
    assert inputs["decoder_input_ids"].tolist() == [[9, 3, 4, 5]]
    assert task.targets(tokens).tolist() == [[3, 4, 5, 6]]


@pytest.mark.parametrize("change", [1e-3, 60.0, 200.0, 1e6])
def test_divergences_of_any_size_are_those_of_float64(change: float) -> None:
    before = torch.tensor([[0.0, -change], [change, 0.0], [1.0, 2.0]])
    after = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0 + 1e-4, 2.0]])
    log_p, log_q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(NextToken().divergences(before, after), expected, rtol=1e-4, atol=1e-9)


def test_drawn_features_have_the_curvature_of_the_divergence() -> None:
    """The mean of squared slopes, halved, is the divergence of a small step."""
    generator = torch.Generator().manual_seed(0)
    features, direction = (torch.randn(6, 8, generator=generator) for _ in range(2))
    task, step = Features(), torch.zeros((), requires_grad=True)
    slopes = []
    for seed in range(4000):
        loss = task.loss(features + step * direction, torch.zeros(6, dtype=torch.long), seed, True)
        slopes.append(torch.autograd.grad(loss, step)[0])
    moved = task.divergences(features, features + 1e-2 * direction).sum() / 1e-4
    assert float(torch.stack(slopes).square().mean()) / 2 == pytest.approx(float(moved), rel=0.05)


def test_windows_of_an_encoder_begin_and_end_as_it_was_trained() -> None:
    tokenizer = build_tokenizer()
    tokenizer.cls_token, tokenizer.sep_token = tokenizer.bos_token, tokenizer.eos_token
    ends = Features().ends(tokenizer)
    assert ends == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    plain = token_windows(SMALL["dataset"], tokenizer, num_windows=3, seq_len=30, seed=None)
    found = token_windows(SMALL["dataset"], tokenizer, num_windows=3, seq_len=32, seed=None, ends=ends)
    assert torch.equal(found.tokens[:, 1:-1], plain.tokens)
    assert (found.tokens[:, 0] == ends[0]).all()
    assert (found.tokens[:, -1] == ends[1]).all()
    assert Features().ends(build_tokenizer()) is None
    assert NextToken().ends(tokenizer) is None


def loud(model_type: str, folder: Path) -> Path:
    """Its answers depend on its weights."""
    network, generator = build_causal(model_type), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(0, 0.3, generator=generator)
    return save_model(network, folder)


@pytest.fixture(scope="module", params=["bert", "t5"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    place = tmp_path_factory.mktemp(request.param)
    recovery = {"recover": True, "recover_samples": 32, "recover_steps": 40, "recover_learning_rate": 1e-2}
    settings: dict[str, Any] = SMALL | recovery | {"budget": "3.5bpw", "sensitivity": "kronecker"}
    model = loud(request.param, place / "model")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    recipe = Recipe.of(model=str(model), **settings)
    return compress(recipe, Registry(place / "registry"), place / "out")


def test_it_is_measured_recovered_and_reported(done: Compressed) -> None:
    assert done.evaluation is not None
    assert done.recovery is not None
    assert done.evaluation.kl_divergence.mean > 0
    assert done.recovery.best_kl < done.recovery.start_kl
    report = json.loads((done.folder / "report" / "report.json").read_text())
    page = (done.folder / "report" / "index.html").read_text()
    if report["auto_class"] == "AutoModelForMaskedLM":
        assert [measure.name for measure in done.evaluation.measures()] == ["kl_divergence", "cosine_similarity"]
        assert done.evaluation.cosine_similarity is not None
        assert 0.8 < done.evaluation.cosine_similarity.mean < 1
        assert "an encoder writes no text" in page
        assert report["evaluation"]["samples"] == {"compressed": None, "original": None}
        assert "perplexity" not in page
    else:
        assert report["auto_class"] == "AutoModelForSeq2SeqLM"
        assert [measure.name for measure in done.evaluation.measures()] == [
            "perplexity",
            "kl_divergence",
            "top1_agreement",
        ]
        assert done.evaluation.num_tokens == 2 * 16
        assert isinstance(report["evaluation"]["samples"]["compressed"], str)
    assert f"from transformers import {report['auto_class']}, AutoTokenizer" in page


def test_a_user_loads_it_packed(done: Compressed) -> None:
    config = transformers.AutoConfig.from_pretrained(done.folder)
    loaded = auto_class(config).from_pretrained(done.folder, dtype=torch.float32)
    task, tokens = task_of(config), torch.arange(16)[None]
    with torch.no_grad():
        answer = task.answer(loaded, task.inputs(tokens))
        assert torch.equal(answer, task.answer(load_packed(done.folder), task.inputs(tokens)))


def test_what_lies_in_folders_beside_the_model_keeps_its_place(done: Compressed) -> None:
    assert json.loads((done.folder / "1_Pooling" / "config.json").read_text()) == {"pooling_mode": "mean"}
    assert json.loads((done.folder / "config.json").read_text())["model_type"] in ("bert", "t5")


def test_an_encoder_continues_no_text(done: Compressed, capsys: pytest.CaptureFixture[str]) -> None:
    if auto_class(transformers.AutoConfig.from_pretrained(done.folder)).__name__ == "AutoModelForMaskedLM":
        with pytest.raises(CheckpointError, match="is an encoder"):
            stream_text(done.folder, "Once", max_new_tokens=3, chat=False, device="cpu")
    else:
        stream_text(done.folder, "Once", max_new_tokens=3, chat=False, device="cpu")
        assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("model_type", "most"), [("bert", 128), ("roberta", 125), ("t5", None), ("gpt2", 128), ("opt", 128), ("bart", 128)]
)
def test_windows_that_are_longer_than_the_model_reads_are_refused(
    model_type: str, most: int | None, tmp_path: Path
) -> None:
    """RoBERTa's first position is that after its padding, 2."""
    spec = str(save_model(build_causal(model_type), tmp_path / "model"))
    model = open_model(spec)
    assert model.num_positions == most
    longest = most or 300
    settings: dict[str, Any] = SMALL | {"sensitivity": "none", "eval_windows": 1}
    windows = Texts.of(Recipe.of(model=spec, **(settings | {"eval_seq_len": longest})), model, SILENT).evaluation
    assert windows is not None
    with torch.no_grad():
        model.task.answer(model.load(), model.task.inputs(windows.tokens))
    if most is not None:
        with pytest.raises(CalibrationError, match=f"longer than the {most} positions"):
            Texts.of(Recipe.of(model=spec, **(settings | {"eval_seq_len": most + 1})), model, SILENT)


def test_sentence_transformers_load_an_encoder_without_its_head(done: Compressed) -> None:
    """They take AutoModel, whatever class the config names."""
    config = transformers.AutoConfig.from_pretrained(done.folder)
    if config.model_type != "bert":
        return
    alone, tokens = transformers.AutoModel.from_pretrained(done.folder, dtype=torch.float32), torch.arange(16)[None]
    with torch.no_grad():
        expected = Features().answer(load_packed(done.folder), {"input_ids": tokens})
        assert torch.equal(alone(input_ids=tokens).last_hidden_state, expected)


@pytest.mark.parametrize("model_type", ["marian", "pegasus", "t5_encoder"])
def test_models_that_scale_what_they_embed(model_type: str, tmp_path: Path) -> None:
    """Or whose blocks pass more than hidden states, as T5's encoder alone: statistics are of the real network."""
    model = open_model(str(loud(model_type, tmp_path / "model")))
    network, tokens = open_network(model, "cpu", lambda said: None), torch.arange(40)[None] + 20
    hidden = network.embed(tokens)
    for index in range(network.num_blocks):
        with torch.no_grad(), network.block(index):
            hidden = network.through(index, tokens, hidden)
    with torch.no_grad():
        torch.testing.assert_close(
            network.head(tokens, hidden), model.task.answer(model.load(), model.task.inputs(tokens))
        )
    windows = token_windows(SMALL["dataset"], model.tokenizer(), num_windows=2, seq_len=32, seed=0)
    collect_statistics(model, windows, "fisher", tmp_path, seed=0, device="cpu")
    found = Statistics.open(lambda name: tmp_path / "out" / name)
    assert [each.name for each in model.matrices if not found.of(each).fisher_diag.any()] == []


@pytest.mark.parametrize(("model_type", "named"), [("mpnet", "MPNetForMaskedLM"), ("roberta", "RobertaForMaskedLM")])
def test_files_without_the_head_that_the_config_names(model_type: str, named: str, tmp_path: Path) -> None:
    """As sentence-transformers save them."""
    folder = save_model(build_causal(model_type), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [named]}))
    model = open_model(str(folder))
    assert model.config.architectures == config["architectures"]
    recipe = Recipe.of(model=str(folder), **(SMALL | {"sensitivity": "none", "ranks": (0,), "eval_windows": 0}))
    done = compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out")
    assert json.loads((done.folder / "config.json").read_text())["architectures"] == config["architectures"]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_files_whose_config_names_nothing(model_type: str, tmp_path: Path) -> None:
    folder = save_model(build_causal(model_type), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert isinstance(open_model(str(folder)).task, Features)


def test_weights_of_a_head_that_an_encoder_lacks_are_an_error(tmp_path: Path) -> None:
    recipe = Recipe.of(
        model=str(loud("bert", tmp_path / "model")), **(SMALL | {"recover": True, "recover_ce_weight": 1.0})
    )
    with pytest.raises(RecipeError, match="Leave --recover-hidden-weight and --recover-ce-weight at 0"):
        compress(recipe, Registry(tmp_path / "registry"), tmp_path / "out")


def test_no_room_for_text_between_the_ends() -> None:
    with pytest.raises(CalibrationError, match="has no room for text"):
        token_windows(SMALL["dataset"], build_tokenizer(), num_windows=1, seq_len=2, seed=None, ends=(0, 1))


def test_foreign_words_are_no_class() -> None:
    assert [known_class(report) for report in (None, {}, {"auto_class": ["x"]}, {"auto_class": "os.system"})] == [
        "AutoModelForCausalLM"
    ] * 4
    assert known_class({"auto_class": "AutoModel"}) == "AutoModel"


def test_an_encoder_is_not_compared_with_a_decoder(tiny_model_dir: Path, tmp_path: Path) -> None:
    encoder, decoder = open_model(str(loud("bert", tmp_path / "model"))), open_model(str(tiny_model_dir))
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    base = base_log_probs(decoder.load, tokens, cache_dir=tmp_path / "cache", key="decoder")
    with pytest.raises(CheckpointError, match="is an encoder and the other is not"):
        evaluate(encoder.load(), base, tokens)


def test_pages_show_what_was_measured(done: Compressed, tmp_path: Path) -> None:
    """The model's card, the page of several budgets, and the figures that gates are made of."""
    registry = Registry(done.folder.parent / "registry")
    version = registry.version("out")
    card = render_card(VersionFacts.of(registry, version), "me/tiny", "v1")
    header = ModelCard(card).data
    figures = figures_of(registry, version)
    folder = tmp_path / "budgets"
    shutil.copytree(done.folder, folder / "3.5bpw")
    write_pareto(folder)
    page = (folder / "index.html").read_text()
    metrics = [result.metric_type for result in header.eval_results]
    if header.pipeline_tag == "fill-mask":
        assert metrics == ["kl_divergence", "cosine_similarity"]
        assert "AutoModelForMaskedLM.from_pretrained" in card
        assert "generate(" not in card
        assert "cosine similarity" in page
        assert "perplexity" not in page
        assert 0.8 < figures["cosine"] < 1
        assert "perplexity" not in figures
    else:
        assert header.pipeline_tag == "text2text-generation"
        assert metrics == ["perplexity", "kl_divergence", "top1_agreement"]
        assert "AutoModelForSeq2SeqLM.from_pretrained" in card
        assert "perplexity" in page
        assert "cosine" not in figures
