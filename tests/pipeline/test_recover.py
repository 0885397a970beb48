"""Recovery lowers the held-out divergence or changes nothing, and a kill changes nothing either."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline import recover as recover_module
from pipeline import training as training_module
from pipeline import training_state
from pipeline.errors import CalibrationError, NonFiniteError, RecipeChangedError
from pipeline.recover import Recovered, recover
from pipeline.recovery_loss import mean_kl
from pipeline.recovery_settings import RecoverySettings
from pipeline.teacher import TeacherWindows, teacher_windows
from pipeline.training import AsStored, Training, compute_of
from tests.pipeline.tiny_packed import original_llama, packed_llama, random_windows

TRAINED = ("factors", "norms")
SETTINGS = RecoverySettings(
    train=TRAINED, steps=6, batch_windows=2, check_every=2, num_top=16, compute="float32", learning_rate=3e-3
)
TOKENS = random_windows(8)


def in_bfloat16(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v if name.endswith("weight_gain") else v.to(torch.bfloat16) for name, v in values.items()}


def run(
    work: Path, settings: RecoverySettings = SETTINGS, network=None, as_stored: AsStored = in_bfloat16, **options
) -> Recovered:
    work.mkdir(exist_ok=True)
    with_hidden = settings.hidden_weight > 0
    teacher = teacher_windows(
        original_llama, TOKENS, work / "teacher", num_top=settings.num_top, with_hidden=with_hidden
    )
    return recover(network or packed_llama(), teacher, settings, work, as_stored=as_stored, **options)


def put_in(network, found: Recovered, as_stored: AsStored = in_bfloat16) -> None:
    missing = network.load_state_dict(as_stored(found.values), strict=False)
    assert not missing.unexpected_keys


def held_out_kl(network, work: Path) -> float:
    teacher = teacher_windows(original_llama, TOKENS, work / "teacher", num_top=16, with_hidden=False)
    window = teacher.window(7, torch.device("cpu"))
    with torch.no_grad():
        return mean_kl(network(TOKENS[7:], use_cache=False).logits[0, :-1], window).item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": ("factors",)},
        {"train": ("norms",)},
        {"train": ("scales",)},
        {"compute": "bfloat16"},
        {"hidden_weight": 1.0, "ce_weight": 0.01},
    ],
    ids=str,
)
def test_the_held_out_divergence_falls(changes: dict, tmp_path: Path) -> None:
    found = run(tmp_path, SETTINGS.model_copy(update=changes))
    assert found.best_kl < found.start_kl
    assert found.values
    assert [check.step for check in found.checks] == [0, 2, 4, 6]
    assert found.steps == 6
    assert all(math.isfinite(check.train_loss) for check in found.checks[1:] if check.train_loss is not None)


def test_the_rate_falls_with_what_is_left_to_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson = recover_module._Recovery(packed_llama(), TeacherWindows(Path, TOKENS), SETTINGS)
    rates: list[float] = []
    real = training_module.adam_step

    def remembered(*arguments: Any, learning_rate: float, **others: Any) -> None:
        rates.append(learning_rate)
        real(*arguments, learning_rate=learning_rate, **others)

    monkeypatch.setattr(training_module, "adam_step", remembered)
    found = run(tmp_path)
    assert rates == pytest.approx([SETTINGS.rate(step) * lesson.rate_share(found.start_kl) for step in range(6)])
    shares = [lesson.rate_share(start) for start in (1.0, 0.15, 0.0375, 0.0, -1e-9)]
    assert shares == pytest.approx([1, 1, 0.5, 0, 0])


def test_the_values_put_in_give_exactly_what_was_measured(tmp_path: Path) -> None:
    network = packed_llama()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert held_out_kl(network, tmp_path) == pytest.approx(run(tmp_path, network=network).start_kl, rel=1e-5)
    found = run(tmp_path, network=network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    put_in(network, found)
    assert held_out_kl(network, tmp_path) == pytest.approx(found.best_kl, rel=1e-5)
    for name, tensor in network.state_dict().items():
        changed = not torch.equal(tensor, before[name])
        assert not changed or name in found.values


def test_what_is_measured_is_as_it_will_be_stored(tmp_path: Path) -> None:
    def coarse(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: (v * 64).round() / 64 if "low_rank" in name else v.to(torch.float16) for name, v in values.items()
        }

    found = run(tmp_path, as_stored=coarse)
    assert found.values
    network = packed_llama()
    put_in(network, found, coarse)
    assert held_out_kl(network, tmp_path) == pytest.approx(found.best_kl, rel=1e-5)


def test_without_a_gain_nothing_changes(tmp_path: Path) -> None:
    found = run(tmp_path, SETTINGS.model_copy(update={"learning_rate": 100.0, "patience": 2, "check_every": 1}))
    assert found.values == {}
    assert found.best_kl == found.start_kl
    assert found.steps == 4, "patience counts in the second half"


def test_the_held_out_windows_are_never_trained_on(tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []
    loss = recover_module._Recovery.loss
    monkeypatch.setattr(
        recover_module._Recovery, "loss", lambda self, index: (seen.append(index), loss(self, index))[1]
    )
    run(tmp_path, SETTINGS.model_copy(update={"held_out_share": 0.25}))
    assert sorted(seen) == sorted(2 * list(range(6))), "each epoch has every training window once"
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize("num_windows", [2, 7, 8, 64, 512])
@pytest.mark.parametrize("share", [0.01, 0.125, 0.99])
def test_there_is_always_something_to_train_and_to_measure_on(num_windows: int, share: float) -> None:
    held_out = RecoverySettings(train=TRAINED, held_out_share=share).num_held_out(num_windows)
    assert 1 <= held_out < num_windows
    assert held_out <= 16


def test_the_rate_rises_and_falls() -> None:
    settings = RecoverySettings(train=TRAINED, steps=20)
    rates = [settings.rate(step) for step in range(20)]
    assert rates[0] < rates[1] == settings.learning_rate
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert min(rates) > 0
    assert RecoverySettings(train=TRAINED, warmup_share=0, steps=1).rate(0) == settings.learning_rate


@pytest.mark.parametrize("stopped_at", [0, 1, 4, 5])
def test_a_kill_anywhere_ends_in_the_same_result(stopped_at: int, tmp_path: Path, monkeypatch) -> None:
    whole = run(tmp_path / "whole")
    monkeypatch.setattr(training_state, "SAVE_SHARE", 1e9)  # save after every step
    move = Training._move

    def killed(self, step: int) -> None:
        if step == stopped_at:
            raise KeyboardInterrupt
        move(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_move", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    steps: list[int] = []
    monkeypatch.setattr(Training, "_move", lambda self, step: (steps.append(step), move(self, step)))
    resumed = run(tmp_path / "cut")
    assert steps == list(range(stopped_at, 6))
    assert resumed.checks == whole.checks
    assert resumed.values.keys() == whole.values.keys()
    assert all(torch.equal(value, whole.values[name]) for name, value in resumed.values.items())


def test_a_finished_recovery_is_not_done_again(tmp_path: Path, monkeypatch) -> None:
    first = run(tmp_path)
    monkeypatch.setattr(Training, "_add_gradients", None)
    again = run(tmp_path)
    assert again.checks == first.checks
    assert all(torch.equal(again.values[name], value) for name, value in first.values.items())


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    one, same = run(tmp_path / "one"), run(tmp_path / "same")
    other = run(tmp_path / "other", SETTINGS.model_copy(update={"seed": 1}))
    assert one.checks == same.checks
    assert one.checks[1:] != other.checks[1:]


def test_another_recovery_in_the_same_place_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(RecipeChangedError, match=r"learning_rate was 0\.003 and is now 0\.1"):
        run(tmp_path, SETTINGS.model_copy(update={"learning_rate": 0.1}))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_and_leaves_the_last_save(where: str, tmp_path: Path, monkeypatch) -> None:
    network, add = packed_llama(), Training._add_gradients
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}

    def broken(self, step: int) -> float:
        if step == 3 and where == "loss":
            next(iter(self.live.values())).data.fill_(torch.nan)
        total = add(self, step)
        if step == 3:
            next(iter(self.live.values())).grad[0] = torch.inf
        return total

    with monkeypatch.context() as patch:
        patch.setattr(training_state, "SAVE_SHARE", 1e9)
        patch.setattr(Training, "_add_gradients", broken)
        with pytest.raises(NonFiniteError, match=rf"{where}.* at step 3 .*learning rate of 0\.003"):
            run(tmp_path, network=network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    resumed, whole = run(tmp_path, network=network), run(tmp_path / "whole")
    assert resumed.checks == whole.checks
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("passes", [0, 1, 7], ids=["first measurement", "first step", "later step"])
def test_where_memory_runs_out_it_goes_on_without_copies_and_computes_activations_again(
    passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, lavish = recover_module._Recovery.answer, []

    def short(self, tokens: Tensor) -> Tensor:
        copies = [module for module in self.network.modules() if getattr(module, "dense", None) is not None]
        if copies or not any(getattr(module, "gradient_checkpointing", False) for module in self.network.modules()):
            lavish.append(len(copies))
            if len(lavish) > passes:
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return answer(self, tokens)

    monkeypatch.setattr(recover_module, "can_keep_activations", lambda *_, **__: True)
    whole = run(tmp_path / "whole")
    network = packed_llama()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    monkeypatch.setattr(recover_module._Recovery, "answer", short)
    found = run(tmp_path / "short", network=network, dense_bytes=2**30)
    assert lavish == [14] * (passes + 1), "then it went on in less memory, and all the way"
    assert [check.held_out_loss for check in found.checks] == pytest.approx(
        [check.held_out_loss for check in whole.checks], rel=1e-3
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in network.modules())


def test_where_memory_runs_out_and_nothing_is_left_to_save_it_is_said(tmp_path: Path, monkeypatch) -> None:
    calls = []

    def short(self, tokens: Tensor) -> Tensor:
        calls.append(tokens)
        raise MemoryError("no more")

    monkeypatch.setattr(recover_module._Recovery, "answer", short)
    with pytest.raises(MemoryError, match="no more"):
        run(tmp_path, dense_bytes=2**30)
    assert len(calls) == 2


@pytest.mark.parametrize("tokens", [TOKENS[:1], TOKENS[0], TOKENS.float(), TOKENS[:, :1]], ids=lambda t: str(t.shape))
def test_unusable_windows_are_refused(tokens: Tensor, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="held out"):
        recover(packed_llama(), TeacherWindows(tmp_path.joinpath, tokens), SETTINGS, tmp_path, as_stored=in_bfloat16)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"learning_rate": 0}, {"held_out_share": 1.0}, {"train": ("codes",)}, {"speed": 1}], ids=str
)
def test_wrong_settings_are_named(wrong: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RecoverySettings(**({"train": TRAINED} | wrong))


@pytest.mark.parametrize(
    ("device", "has_tiles", "capability", "expected"),
    [
        ("cuda:0", False, (9, 0), "bfloat16"),
        ("cuda", True, (7, 5), "float32"),
        ("cpu", True, (7, 5), "bfloat16"),
        ("cpu", False, (9, 0), "float32"),
    ],
)
def test_bfloat16_is_for_devices_that_multiply_it(device, has_tiles, capability, expected: str, monkeypatch) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: has_tiles)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert compute_of(device) == expected
