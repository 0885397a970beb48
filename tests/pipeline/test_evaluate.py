"""The laws of the evaluation, on a random Llama of two layers."""

import copy
import gc
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline import atomic, base_logits, evaluate_folder, quality
from pipeline.base_logits import BaseLogits, base_log_probs, cache_key, read_window, summarize
from pipeline.calibration import TokenWindows
from pipeline.errors import CalibrationError, CheckpointError, NonFiniteError
from pipeline.eval_report import Estimate, EvalReport
from pipeline.evaluate import evaluate, sample_text, score_window
from pipeline.model import open_model
from pipeline.progress import SILENT
from tests.pipeline.notes import Notes

VOCAB_SIZE = 200
NUM_WINDOWS, SEQ_LEN = 5, 80  # more positions than one slice


def tiny_llama(vocab_size: int = VOCAB_SIZE) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def perturbed(model: LlamaForCausalLM, size: float) -> LlamaForCausalLM:
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=size)
    return copied


class Spy:
    """A loader that counts its calls, and the windows that its model computes; may fail after some."""

    def __init__(self, model: LlamaForCausalLM, fail_after: int | None = None) -> None:
        self.num_loads = self.num_windows = 0
        self._model = copy.deepcopy(model)
        self._fail_after = fail_after
        self._model.register_forward_pre_hook(self._count)

    def __call__(self) -> LlamaForCausalLM:
        self.num_loads += 1
        return self._model

    def _count(self, *_: object) -> None:
        if self.num_windows == self._fail_after:
            raise KeyboardInterrupt
        self.num_windows += 1


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def other(model) -> LlamaForCausalLM:
    return perturbed(model, 0.02)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (NUM_WINDOWS, SEQ_LEN), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def prepare(model, tokens, tmp_path) -> Callable[..., BaseLogits]:
    def prepare(loader=None, **settings) -> BaseLogits:
        return base_log_probs(loader or (lambda: model), tokens, **{"cache_dir": tmp_path, "key": "base", **settings})

    return prepare


def window_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.logprobs"))


def exact_scores(model, other, tokens) -> dict[str, np.ndarray]:
    """Every figure a token [windows, seq_len - 1], from whole float64 logits and no rounding."""
    with torch.no_grad():
        base, logits = (m(input_ids=tokens).logits[:, :-1].double() for m in (model, other))
    targets = tokens[:, 1:]

    def nll(x):
        return torch.nn.functional.cross_entropy(x.transpose(1, 2), targets, reduction="none").numpy()

    log_p, log_q = base.log_softmax(-1), logits.log_softmax(-1)
    return {
        "nll": nll(logits),
        "base_nll": nll(base),
        "kl": torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).numpy(),
        "top1": (base.argmax(-1) == logits.argmax(-1)).numpy(),
    }


def test_model_agrees_with_itself(model, tokens, prepare):
    report = evaluate(model, prepare(), tokens, batch_size=2)
    assert 0 <= report.kl_divergence.mean < 1e-5
    assert 0 <= report.kl_p99 < 1e-5
    assert report.top1_agreement == Estimate(1.0, 0.0)
    assert report.perplexity.mean == pytest.approx(report.base_perplexity.mean, rel=1e-6)


def test_where_memory_runs_out_windows_are_scored_one_by_one(other, tokens, prepare):
    base, tight = prepare(), copy.deepcopy(other)
    seen = []

    def refuse(module, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > most_windows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    tight.register_forward_pre_hook(refuse, with_kwargs=True)
    most_windows = 1
    found, expected = (evaluate(each, base, tokens, batch_size=1 if each is other else 4) for each in (tight, other))
    assert found == expected
    assert seen == [4, 1, 1, 1, 1, 1]
    most_windows = 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(tight, base, tokens)


def test_divergence_grows_with_the_perturbation(model, tokens, prepare):
    base = prepare()
    reports = [evaluate(perturbed(model, size), base, tokens) for size in (0.003, 0.01, 0.03)]
    divergences = [report.kl_divergence.mean for report in reports]
    agreements = [report.top1_agreement.mean for report in reports]
    assert 1e-5 < divergences[0] < divergences[1] < divergences[2]
    assert 1 > agreements[0] > agreements[2]


def test_figures_equal_a_plain_computation(model, other, tokens, prepare):
    report = evaluate(other, prepare(), tokens)
    exact = exact_scores(model, other, tokens)
    assert report.perplexity.mean == pytest.approx(np.exp(exact["nll"].mean()), rel=1e-5)
    assert report.base_perplexity.mean == pytest.approx(np.exp(exact["base_nll"].mean()), rel=1e-5)
    assert report.kl_divergence.mean == pytest.approx(exact["kl"].mean(), rel=1e-3)
    assert report.kl_p99 == pytest.approx(np.quantile(exact["kl"], 0.99), rel=1e-3)
    assert report.top1_agreement.mean == exact["top1"].mean()
    assert (report.num_tokens, report.num_windows) == (NUM_WINDOWS * (SEQ_LEN - 1), NUM_WINDOWS)


def test_standard_errors_are_clustered_by_window(model, other, tokens, prepare):
    report = evaluate(other, prepare(), tokens)
    exact = exact_scores(model, other, tokens)

    def error(name):
        return exact[name].mean(axis=1).std(ddof=1) / np.sqrt(NUM_WINDOWS)

    assert report.kl_divergence.standard_error == pytest.approx(error("kl"), rel=1e-2)
    assert report.top1_agreement.standard_error == pytest.approx(error("top1"))
    assert report.perplexity.standard_error == pytest.approx(report.perplexity.mean * error("nll"), rel=1e-4)


def test_one_window_has_no_standard_error(model, tokens, prepare, tmp_path):
    one = tokens[:1]
    report = evaluate(model, base_log_probs(lambda: model, one, cache_dir=tmp_path, key="one"), one)
    assert report.perplexity.standard_error is None
    assert "±" not in "".join(report.rows()[0])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_batch_size_does_not_change_the_figures(other, tokens, prepare, batch_size):
    base = prepare()
    one, many = (
        evaluate(other, base, tokens, batch_size=1),
        evaluate(other, base, tokens, batch_size=batch_size),
    )
    for name in ("perplexity", "kl_divergence", "top1_agreement"):
        assert getattr(one, name).mean == pytest.approx(getattr(many, name).mean, rel=1e-5)
    assert one.base_perplexity == many.base_perplexity


def test_cached_equals_live_exactly(model, other, tokens, prepare, tmp_path):
    cached, again, live = prepare(), prepare(), prepare(cache_dir=tmp_path / "live", limit_bytes=0)
    assert len(window_files(tmp_path / "base")) == NUM_WINDOWS
    assert not (tmp_path / "live").exists()
    report = evaluate(other, cached, tokens)
    assert evaluate(other, again, tokens) == evaluate(other, live, tokens) == report


def test_a_full_cache_needs_no_model(other, tokens, prepare):
    prepare()
    spy = Spy(other)
    evaluate(other, prepare(spy), tokens)
    assert spy.num_loads == 0


def test_a_killed_run_keeps_its_finished_windows(model, other, tokens, prepare, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare(Spy(model, fail_after=2))
    assert len(window_files(tmp_path)) == 2
    spy = Spy(model)
    report = evaluate(other, prepare(spy), tokens)
    assert (spy.num_loads, spy.num_windows) == (1, NUM_WINDOWS - 2)
    uninterrupted = evaluate(other, prepare(cache_dir=tmp_path / "fresh"), tokens)
    assert report == uninterrupted
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("where", [0, 40, 60, -1], ids=["digest", "header", "layout", "data"])
def test_a_flipped_byte_is_computed_anew(model, other, tokens, prepare, tmp_path, where):
    report = evaluate(other, prepare(), tokens)
    damaged = window_files(tmp_path)[3]
    content = bytearray(damaged.read_bytes())
    content[where] ^= 1
    damaged.write_bytes(content)
    spy = Spy(model)
    assert evaluate(other, prepare(spy), tokens) == report
    assert (spy.num_loads, spy.num_windows) == (1, 1)
    assert read_window(damaged) is not None


@pytest.mark.parametrize("content", [b"", b"short", None], ids=["empty", "cut off", "gone"])
def test_a_file_lost_after_the_check_is_computed_live(model, other, tokens, prepare, tmp_path, content):
    report = evaluate(other, prepare(), tokens)
    spy = Spy(model)
    base = prepare(spy)
    victim = window_files(tmp_path)[0]
    victim.unlink() if content is None else victim.write_bytes(content)
    assert evaluate(other, base, tokens) == report
    assert (spy.num_loads, spy.num_windows) == (1, 1)


def test_a_cache_of_other_tokens_is_not_used(model, tokens, prepare, tmp_path):
    prepare()
    changed = tokens.clone()
    changed[1] = changed[1].flip(0)
    spy = Spy(model)
    base_log_probs(spy, changed, cache_dir=tmp_path, key="base")
    assert spy.num_windows == 1


def test_above_the_limit_nothing_is_cached(model, other, tokens, prepare, tmp_path):
    needed_bytes = NUM_WINDOWS * (SEQ_LEN - 1) * VOCAB_SIZE * 2
    notes, spy = Notes(), Spy(model)
    base = prepare(spy, limit_bytes=needed_bytes - 1, progress=notes)
    assert spy.num_windows == 0
    evaluate(other, base, tokens)
    assert (spy.num_loads, spy.num_windows) == (1, NUM_WINDOWS)
    assert not window_files(tmp_path)
    assert f"{NUM_WINDOWS} windows of {SEQ_LEN} tokens need 0.2 MiB" in notes.said[0]
    assert "runs beside" in notes.said[0]
    prepare(limit_bytes=needed_bytes)
    assert len(window_files(tmp_path)) == NUM_WINDOWS


def test_a_full_disk_caches_nothing(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(base_logits.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    notes = Notes()
    prepare(progress=notes)
    assert "free disk space" in notes.said[0]
    assert not window_files(tmp_path)


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(other, tokens, prepare, tmp_path):
    report = evaluate(other, prepare(), tokens)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    notes = Notes()
    assert evaluate(other, prepare(cache_dir=blocked, progress=notes), tokens) == report
    assert "cannot be kept" in notes.said[0]


def test_a_model_that_cannot_be_opened_is_not_taken_for_a_full_disk(prepare):
    def absent():
        raise FileNotFoundError("no such model")

    with pytest.raises(FileNotFoundError, match="no such model"):
        prepare(absent)


def test_what_killed_runs_left_is_removed_once_old(prepare, tmp_path):
    (tmp_path / "base").mkdir()
    old, young = (
        tmp_path / "base" / ".window-00000.logprobs.1.tmp",
        tmp_path / "base" / ".window-00001.logprobs.2.tmp",
    )
    for path in (old, young):
        path.write_bytes(b"half a window")
    os.utime(old, (0, 0))
    prepare()
    assert not old.exists()
    assert young.exists()  # another process may be writing it


def test_a_filled_cache_lets_the_model_go(model, prepare):
    spies = []

    def load():
        spies.append(copy.deepcopy(model))
        return spies[-1]

    base = prepare(load)
    held = weakref.ref(spies.pop())
    gc.collect()
    assert held() is None
    assert base.window(0) is not None


def test_a_failed_write_leaves_nothing(prepare, tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    notes = Notes()
    prepare(progress=notes)
    assert "disk full" in notes.said[0]
    assert not list((tmp_path / "base").iterdir())


def test_the_limit_holds_for_all_keys_together(prepare, tmp_path):
    needed_bytes = NUM_WINDOWS * (SEQ_LEN - 1) * VOCAB_SIZE * 2
    prepare(key="old")
    (tmp_path / "old" / "keep.txt").write_text("not a window")
    prepare(key="new", limit_bytes=needed_bytes + needed_bytes // 2)
    assert len(window_files(tmp_path / "new")) == NUM_WINDOWS
    assert 0 < len(window_files(tmp_path / "old")) < NUM_WINDOWS
    assert (tmp_path / "old" / "keep.txt").exists()


def test_making_room_spares_the_finished_windows_of_a_killed_run(model, prepare, tmp_path):
    prepare(key="old")
    with pytest.raises(KeyboardInterrupt):
        prepare(Spy(model, fail_after=2))
    prepare(limit_bytes=NUM_WINDOWS * (SEQ_LEN - 1) * VOCAB_SIZE * 2)
    assert len(window_files(tmp_path / "base")) == NUM_WINDOWS
    assert not window_files(tmp_path / "old")


def test_cache_key_tells_weights_tokens_and_dtype_apart(tokens):
    settings = [("a", tokens, torch.float32), ("b", tokens, torch.float32), ("a", tokens, torch.bfloat16)]
    settings.append(("a", tokens.flip(0), torch.float32))
    assert len({cache_key(*setting) for setting in settings}) == 4
    assert cache_key(*settings[0]) == cache_key("a", tokens.clone(), torch.float32)


def broken_in_window(model: LlamaForCausalLM, tokens: Tensor, window: int, position: int) -> LlamaForCausalLM:
    """A copy whose logits are infinite from `position` of `window` on, and nowhere else."""
    copied = copy.deepcopy(model)

    def poison(module, args, kwargs, output):
        output.logits[(kwargs["input_ids"] == tokens[window]).all(dim=-1), position:] = torch.inf
        return output

    copied.register_forward_hook(poison, with_kwargs=True)
    return copied


def test_non_finite_logits_name_the_model_and_the_window(model, tokens, prepare, tmp_path):
    broken = broken_in_window(model, tokens, window=3, position=70)
    with pytest.raises(NonFiniteError, match=r"compressed model .* window 3, first at token 70"):
        evaluate(broken, prepare(), tokens, batch_size=2)
    with pytest.raises(NonFiniteError, match=r"original model .* window 3, first at token 70"):
        prepare(lambda: broken, key="broken")
    assert len(window_files(tmp_path / "broken")) == 3


def test_vocabularies_that_differ_are_refused(tokens, prepare):
    with pytest.raises(CheckpointError, match="predicts 210 tokens and the original 200"):
        evaluate(tiny_llama(vocab_size=210), prepare(), tokens)


def test_bases_of_other_tokens_are_refused(model, tokens, prepare):
    with pytest.raises(ValueError, match="other tokens"):
        evaluate(model, prepare(), tokens.flip(0))


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (24,)])
def test_tokens_that_cannot_be_scored_are_refused(model, shape, tmp_path):
    empty = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(CalibrationError, match="at least one window"):
        base_log_probs(lambda: model, empty, cache_dir=tmp_path, key="base")


def test_report_survives_json(other, tokens, prepare):
    report = evaluate(other, prepare(), tokens)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert EvalReport.from_json(json.loads(text)) == report
    assert list(report.to_json()) == sorted(report.to_json())
    assert all(isinstance(cell, str) and cell for row in report.rows() for cell in row)


def test_a_report_of_another_version_is_refused(other, tokens, prepare):
    data = evaluate(other, prepare(), tokens).to_json()
    del data["kl_p99"]
    with pytest.raises(CheckpointError, match="lacks \\['kl_p99'\\]"):
        EvalReport.from_json({**data, "seconds": 3})


def test_a_perplexity_beyond_floats_is_an_error():
    with pytest.raises(NonFiniteError, match="2000 nats"):
        Estimate(2000.0, 1.0).to_perplexity()


def test_training_state_is_restored(model, tokens, prepare):
    trained = copy.deepcopy(model).train()
    trained.lm_head.eval()
    evaluate(trained, prepare(lambda: trained), tokens)
    assert trained.training
    assert trained.model.layers[0].training
    assert not trained.lm_head.training


@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0, 1e6], ids=str)
def test_float16_holds_flat_and_peaked_distributions(scale):
    """One token with all the probability, thousands with none, values beyond float16: nothing is lost."""
    generator = torch.Generator().manual_seed(3)
    vocab_size = 5000
    logits = scale * torch.randn(64, vocab_size, generator=generator)
    tokens = torch.randint(0, vocab_size, (65,), generator=generator)
    window = summarize(tokens, logits, tokens[1:])
    scores = score_window(logits, window, tokens[1:])
    assert (scores["kl_divergence"] >= 0).all()
    assert scores["kl_divergence"].max() < 1e-5
    assert (scores["top1_agreement"] == 1).all()

    moved = logits + 0.5 * torch.randn(logits.shape, generator=generator)
    exact = torch.nn.functional.kl_div(
        moved.double().log_softmax(-1), logits.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    np.testing.assert_allclose(score_window(moved, window, tokens[1:])["kl_divergence"], exact, rtol=5e-3, atol=1e-5)


def test_tokens_that_tie_after_the_rounding_keep_their_order():
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 7] = 1.0, 1.0 + 1e-5
    tokens = torch.tensor([0, 1])
    window = summarize(tokens, logits, tokens[1:])
    assert window.log_probs[0, 3] == window.log_probs[0, 7]
    assert score_window(logits, window, tokens[1:])["top1_agreement"] == [1.0]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(VOCAB_SIZE - 2)} | {
        "<user>": VOCAB_SIZE - 2,
        "<end>": VOCAB_SIZE - 1,
    }
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def greedy(model, input_ids: list[int], num_tokens: int) -> list[int]:
    for _ in range(num_tokens):
        with torch.no_grad():
            input_ids = [*input_ids, int(model(torch.tensor([input_ids])).logits[0, -1].argmax())]
    return input_ids[-num_tokens:]


def test_sample_is_greedy_and_leaves_the_prompt_out(model, tokenizer):
    sampling = copy.deepcopy(model)
    sampling.generation_config.do_sample = True
    sampling.generation_config.temperature = 2.0
    text = sample_text(sampling, tokenizer, "w5 w6 w7", max_new_tokens=6)
    assert text == tokenizer.decode(greedy(model, [5, 6, 7], 6))


def test_sample_uses_the_chat_template_where_there_is_one(model, tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}<user> {{ m['content'] }} {% endfor %}w9"
    with_template = sample_text(model, chatty, "w5 w6", max_new_tokens=6)
    assert with_template == tokenizer.decode(greedy(model, [VOCAB_SIZE - 2, 5, 6, 9], 6))
    chatty.chat_template = None
    assert sample_text(model, chatty, "w5 w6", 6) == tokenizer.decode(greedy(model, [5, 6], 6))


@pytest.mark.parametrize("module", [quality, evaluate_folder], ids=["run", "command"])
def test_the_packed_model_is_measured_in_float32_like_its_original(
    module, tiny_model_dir, tmp_path: Path, monkeypatch
) -> None:
    """Also on a GPU, where a packed model is otherwise loaded in the checkpoint's own precision."""
    asked = []

    def stop(*args, **options):
        asked.append(next(each for each in args if isinstance(each, torch.dtype)))
        raise KeyboardInterrupt

    for name in ("load_packed", "load_with_adapter"):
        monkeypatch.setattr(module, name, stop, raising=False)
    monkeypatch.setattr(quality, "original_logits", lambda *args: None)
    model = open_model(str(tiny_model_dir))
    windows = TokenWindows(torch.zeros(1, 8, dtype=torch.long), "0", "made up", None, 1)
    texts = {"base_revision": None, "dataset": None, "dataset_revision": None, "num_windows": 1, "seq_len": 8}
    measure = {
        quality: lambda: quality.measured(model, tiny_model_dir, windows, "cuda", tmp_path, SILENT),
        evaluate_folder: lambda: evaluate_folder.evaluate_folder(tiny_model_dir, "base", device="cuda", **texts),
    }
    with pytest.raises(KeyboardInterrupt):
        measure[module]()
    assert asked == [torch.float32]


@pytest.mark.parametrize(("batch_size", "num_kept", "num_batches"), [(1, 2, 3), (2, 2, 2), (2, 3, 2), (2, 1, 3)])
def test_a_call_after_a_kill_scores_only_the_batches_that_are_left(
    batch_size: int, num_kept: int, num_batches: int, other, prepare, tokens, tmp_path: Path
) -> None:
    base = prepare()
    whole = evaluate(other, base, tokens, batch_size=batch_size, keep=tmp_path / "scores")
    for path in sorted((tmp_path / "scores").iterdir())[num_kept:]:
        path.unlink()
    again = Spy(other)
    assert evaluate(again(), base, tokens, batch_size=batch_size, keep=tmp_path / "scores") == whole
    assert again.num_windows == num_batches
