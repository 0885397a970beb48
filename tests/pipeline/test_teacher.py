from pathlib import Path

import pytest
import torch

from pipeline import teacher
from pipeline.errors import NonFiniteError
from pipeline.teacher import coarsened, teacher_windows
from tests.models import build_gpt2
from tests.pipeline.tiny_packed import original_llama, random_windows

CPU = torch.device("cpu")


def test_holds_what_the_original_says(tmp_path: Path) -> None:
    tokens, original = random_windows(2), original_llama()
    found = teacher_windows(original_llama, tokens, tmp_path, num_top=10, with_hidden=True)
    assert len(found) == 2
    for index, row in enumerate(tokens):
        window = found.window(index, CPU)
        with torch.no_grad():
            log_probs = torch.log_softmax(original(row[None]).logits[0, :-1].double(), -1)
            hidden = original.model(row[None]).last_hidden_state[0, :-1]
        assert torch.equal(window.tokens, row)
        assert torch.equal(window.top_tokens.long(), log_probs.topk(10).indices)
        assert window.log_probs.shape == (23, 11)
        expected = log_probs.gather(-1, window.top_tokens.long())
        torch.testing.assert_close(window.log_probs[:, :-1].double(), expected, rtol=2**-11, atol=1e-7)
        torch.testing.assert_close(window.log_probs.double().exp().sum(-1), torch.ones(23).double(), rtol=0, atol=5e-3)
        assert window.hidden is not None
        torch.testing.assert_close(window.hidden.float(), hidden, rtol=2**-10, atol=1e-5)


def test_gpt2s_head_input_is_found_too(tmp_path: Path) -> None:
    tokens, network = random_windows(1), build_gpt2()
    window = teacher_windows(build_gpt2, tokens, tmp_path, num_top=4, with_hidden=True).window(0, CPU)
    with torch.no_grad():
        hidden = network.transformer(tokens).last_hidden_state[0, :-1]
    assert window.hidden is not None
    torch.testing.assert_close(window.hidden.float(), hidden, rtol=2**-10, atol=1e-5)


def test_no_hidden_unless_asked_for(tmp_path: Path) -> None:
    found = teacher_windows(original_llama, random_windows(1), tmp_path, num_top=4, with_hidden=False)
    assert found.window(0, CPU).hidden is None
    found = teacher_windows(original_llama, random_windows(1), tmp_path, num_top=4, with_hidden=True)
    assert found.window(0, CPU).hidden is not None


def test_a_small_vocabulary_keeps_one_token_in_the_bucket() -> None:
    top_tokens, log_probs = coarsened(torch.tensor([[0.0, 1.0, 2.0]]), 64)
    assert top_tokens.tolist() == [[2, 1]]
    torch.testing.assert_close(log_probs.float().exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-3)


def test_finished_windows_survive_an_interruption(tmp_path: Path, monkeypatch) -> None:
    asked, ask = [], teacher._ask

    def stop_at_third(network, tokens, index, num_top, with_hidden):
        asked.append(index)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(network, tokens, index, num_top, with_hidden)

    monkeypatch.setattr(teacher, "_ask", stop_at_third)
    arguments = (original_llama, random_windows(4), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        teacher_windows(*arguments, num_top=4, with_hidden=False)
    teacher_windows(*arguments, num_top=4, with_hidden=False)
    assert asked == [0, 1, 2, 2, 3]


def refuse() -> None:
    raise AssertionError("the original was opened although every answer is there")


def test_the_original_is_not_opened_where_all_is_there(tmp_path: Path) -> None:
    teacher_windows(original_llama, random_windows(2), tmp_path, num_top=4, with_hidden=False)
    again = teacher_windows(refuse, random_windows(2), tmp_path, num_top=4, with_hidden=False)  # type: ignore[arg-type]
    assert len(again) == 2


@pytest.mark.parametrize("damage", ["other tokens", "cut off"])
def test_what_does_not_fit_is_computed_anew(damage: str, tmp_path: Path) -> None:
    tokens, num_top = random_windows(2), 4
    teacher_windows(original_llama, tokens, tmp_path, num_top=num_top, with_hidden=False)
    if damage == "other tokens":
        tokens = random_windows(2, seed=1)
    else:
        (file,) = tmp_path.rglob("window-00001.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
    found = teacher_windows(original_llama, tokens, tmp_path, num_top=num_top, with_hidden=False)
    clean = teacher_windows(original_llama, tokens, tmp_path / "clean", num_top=num_top, with_hidden=False)
    for index in range(2):
        for name, tensor in vars(clean.window(index, CPU)).items():
            ours = vars(found.window(index, CPU))[name]
            assert ours is tensor is None or torch.equal(ours, tensor)


def test_a_broken_original_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        network = original_llama()
        network.model.norm.weight.data[0] = torch.nan
        return network

    with pytest.raises(NonFiniteError, match="original"):
        teacher_windows(broken, random_windows(1), tmp_path, num_top=4, with_hidden=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
