import shutil
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import curvature_scale, divergence_scale, layered_pass, part_sums, summed_parts, tail
from pipeline.calibration import token_windows
from pipeline.curvature_sums import SHRINKAGE, Metric, sums_of
from pipeline.errors import NonFiniteError
from pipeline.layered import LayeredNetwork, open_network
from pipeline.model import Matrix, Model, open_model
from pipeline.statistics import Statistics, collect_statistics
from pipeline.task import NextToken, drawn_labels
from quantizers import weighted_error
from tests.architectures import build_causal
from tests.models import build_llama, save_model
from tests.pipeline.small import SMALL


def windows_of(model: Model, num: int = 3):
    return token_windows(SMALL["dataset"], model.tokenizer(), num_windows=num, seq_len=24, seed=0)


def collect(model: Model, work: Path, metric: Metric = "fisher") -> Statistics:
    work.mkdir(exist_ok=True)
    collect_statistics(model, windows_of(model), metric, work, seed=7, device="cpu")
    return Statistics.open(lambda name: work / "out" / name)


def plain_autograd(model: Model, *, drawn: bool) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """For each window: input [tokens, in], gradient of the output [tokens, out] and of the weight [out, in]."""
    network = model.load()
    seen: dict[str, list[torch.Tensor]] = {}
    for matrix in model.matrices:

        def keep(_, args, output, name=matrix.name):
            output.retain_grad()
            seen[name] = [args[0].detach()[0], output]

        network.get_submodule(matrix.module).register_forward_hook(keep)
    found: dict[str, list[tuple[torch.Tensor, ...]]] = {matrix.name: [] for matrix in model.matrices}
    for index, tokens in enumerate(windows_of(model).tokens):
        network.zero_grad()
        logits = network(tokens[None]).logits[0, :-1]
        labels = drawn_labels(logits.detach(), 7 + index) if drawn else tokens[1:]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for matrix in model.matrices:
            gradient = network.get_parameter(matrix.name).grad
            x, output = seen[matrix.name]
            found[matrix.name].append((x, output.grad[0], gradient.T if matrix.transposed else gradient.clone()))
    return found


@pytest.mark.parametrize("folder", ["tiny_model_dir", "odd_model_dir", "tiny_gpt2_dir"])
@pytest.mark.parametrize("metric", ["fisher", "factored", "input", "guided", "kronecker", "sequence"])
def test_sums_equal_plain_autograd(folder: str, metric: Metric, request, tmp_path: Path) -> None:
    model = open_model(str(request.getfixturevalue(folder)))
    found = collect(model, tmp_path, metric)
    drawn = metric in ("guided", "kronecker", "sequence")
    expected = plain_autograd(model, drawn=drawn)
    for matrix in model.matrices:
        used = expected[matrix.name][: 2 if drawn else 3]  # the last window checks the scale
        x, g = (torch.cat(parts) for parts in list(zip(*used, strict=True))[:2])
        gradients = torch.stack([gradient for _, _, gradient in used])
        fisher = gradients.square().sum(0)
        wanted = {
            "fisher": {"fisher_diag": fisher / 144},
            "factored": {"fisher_diag": torch.outer(fisher.sum(1), fisher.sum(0)) / fisher.sum() / 144},
            "input": {"input_curvature": x.T @ x / 72},
            "guided": {"input_curvature": torch.einsum("to,ti,tj->ij", g.square(), x, x) / 96 / len(g.T)},
            "kronecker": {
                "input_curvature": torch.einsum("t,ti,tj->ij", g.square().sum(1), x, x) / 96,
                "output_curvature": torch.einsum("t,ti,tj->ij", x.square().sum(1), g, g),
            },
            "sequence": {
                "input_curvature": torch.einsum("soi,soj->ij", gradients, gradients) / 96,
                "output_curvature": torch.einsum("soi,spi->op", gradients, gradients),
            },
        }[metric]
        if drawn:
            for name, exact in wanted.items():
                wanted[name] = torch.where(torch.eye(len(exact)) > 0, exact, (1 - SHRINKAGE) * exact)
            if "output_curvature" in wanted:
                wanted["output_curvature"] /= wanted["output_curvature"].trace()
            wanted["input_curvature"] *= found.scales[matrix.name]
        learnt = found.of(matrix)
        for name in ("fisher_diag", "input_curvature", "output_curvature"):
            value = getattr(learnt, name)
            assert (value is None) == (name not in wanted)
            if value is not None:
                scale = float(wanted[name].abs().max())
                torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-5 * scale)
                assert float((value - wanted[name]).norm() / wanted[name].norm()) < 1e-5


@pytest.mark.parametrize("model_type", ["albert", "deberta-v2"])
@pytest.mark.parametrize("metric", ["fisher", "factored", "sequence"])
def test_calls_of_one_layer_in_a_window_are_one_sample(model_type: str, metric: Metric, tmp_path: Path) -> None:
    """ALBERT passes its one block several times; DeBERTa's keys read positions, that are parameters, too."""
    model = open_model(str(save_model(build_causal(model_type), tmp_path / "model")))
    found = collect(model, tmp_path / "work", metric)
    network, trace = model.load(), dict.fromkeys((matrix.name for matrix in model.matrices), 0.0)
    windows = windows_of(model).tokens[: 2 if metric == "sequence" else 3]
    for index, tokens in enumerate(windows):
        network.zero_grad()
        answer = model.task.answer(network, model.task.inputs(tokens[None]))[0]
        model.task.loss(answer, tokens, index + 7 * (metric == "sequence"), metric == "sequence").backward()
        for name in trace:
            trace[name] += float(network.get_parameter(name).grad.square().sum())
    for matrix in model.matrices:
        level = float(found.of(matrix).importance(matrix.shape[0]).sum()) / found.scales.get(matrix.name, 1.0)
        expected = trace[matrix.name] / (2 * len(windows) * model.task.num_scored(windows.shape[1]))
        assert level == pytest.approx(expected, rel=1e-4)


def test_scales_are_what_probes_do_to_the_last_window(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    made: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    real = curvature_scale._probes

    def kept(matrix: Matrix, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made[matrix.name] = real(matrix, *others)
        return made[matrix.name]

    monkeypatch.setattr(curvature_scale, "_probes", kept)
    model = open_model(str(tiny_model_dir))
    found = collect(model, tmp_path, "kronecker")
    expected = plain_autograd(model, drawn=True)
    for matrix in model.matrices:
        out, into = made[matrix.name]
        *_, (_, _, gradient) = expected[matrix.name]
        answers = torch.einsum("op,oi,ip->p", out, gradient, into).square().sum() / 48
        unscaled = found.of(matrix).times(1 / found.scales[matrix.name])
        promised = sum(weighted_error(torch.outer(p, q), unscaled) for p, q in zip(out.T, into.T, strict=True))
        assert found.scales[matrix.name] == pytest.approx(min(max(float(answers) / promised, 0.1), 100), rel=2e-3)
    assert len(set(found.scales.values())) > 1


def test_kronecker_error_of_a_rank_one_curvature_is_the_divergence_of_autograd(monkeypatch) -> None:
    """With one token the factors are exact, and nothing has to be shrunk: tr(H_O E H_I E^T) = (g^T E x)^2 / 2."""
    monkeypatch.setattr("pipeline.curvature_sums.SHRINKAGE", 0.0)
    sums = sums_of("kronecker")
    generator = torch.Generator().manual_seed(0)
    x, g, residual = (torch.randn(shape, generator=generator) for shape in ((1, 5), (1, 7), (7, 5)))
    held = {name: torch.zeros(shape) for name, shape in sums.shapes((7, 5)).items()}
    sums.add(held, x, g)
    error = weighted_error(residual, sums.statistics(held, 1))
    assert error == pytest.approx(float((g @ residual @ x.T).square()) / 2, rel=1e-4)


def test_labels_are_drawn_in_proportion() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    shares = torch.bincount(drawn_labels(logits, 0), minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)
    assert torch.equal(drawn_labels(logits, 1), drawn_labels(logits, 1))
    assert not torch.equal(drawn_labels(logits, 1), drawn_labels(logits, 2))


@pytest.mark.parametrize("metric", ["fisher", "kronecker"])
def test_the_room_for_blocks_changes_no_byte(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: Metric
) -> None:
    """Both blocks at once, as in a small model, or one after the other."""
    tails, real = [], part_sums.tail_of

    def remember(*args: Any) -> range:
        tails.append(real(*args))
        return tails[-1]

    monkeypatch.setattr(part_sums, "tail_of", remember)
    model = open_model(str(tiny_model_dir))
    files = []
    for most_bytes in (0, tail.MOST_BYTES):
        monkeypatch.setattr(tail, "MOST_BYTES", most_bytes)
        work = tmp_path / str(most_bytes)
        collect(model, work, metric)
        files.append({path.name: path.read_bytes() for path in (work / "out").iterdir()})
    assert tails == [range(1, 2), range(2)]
    assert files[0] == files[1]


def test_where_memory_runs_out_fewer_blocks_are_held_at_once(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tails, real = open_model(str(tiny_model_dir)), [], layered_pass._back_through
    expected = collect(model, tmp_path / "roomy", "kronecker")

    def short(blocks: range, *args: Any) -> Iterator[None]:
        tails.append(blocks)
        for number, done in enumerate(real(blocks, *args)):
            if len(blocks) > most_blocks and number == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            yield done

    monkeypatch.setattr(layered_pass, "_back_through", short)
    most_blocks = 1
    found = collect(model, tmp_path / "tight", "kronecker")
    assert tails[:3] == [range(2), range(1, 2), range(1)]
    for matrix in model.matrices:
        for one, other in zip(astuple(found.of(matrix)), astuple(expected.of(matrix)), strict=True):
            assert one is other is None or torch.equal(one, other)
    most_blocks = 0
    with pytest.raises(torch.OutOfMemoryError):
        collect(model, tmp_path / "hopeless", "kronecker")


@pytest.mark.parametrize("folder", ["tiny_model_dir", "tiny_gpt2_dir"])
def test_the_scale_of_kl_is_the_divergence_of_a_disturbed_model(folder: str, request, tmp_path: Path) -> None:
    model = open_model(str(request.getfixturevalue(folder)))
    found = collect(model, tmp_path, "kl")
    window = windows_of(model).tokens[-1:]
    network = model.load()
    with torch.no_grad():
        before = network(window).logits[:, :-1].double().log_softmax(dim=-1)
        for number, matrix in enumerate(model.matrices):
            error = divergence_scale._error(model, matrix, 7 + number)
            weight = network.get_parameter(matrix.name)
            kept = weight.clone()
            weight += error.T if matrix.transposed else error
            after = network(window).logits[:, :-1].double().log_softmax(dim=-1)
            weight.copy_(kept)
            divergence = float((before.exp() * (before - after)).sum(dim=-1).mean())
            assert weighted_error(error, found.of(matrix)) == pytest.approx(divergence, rel=2e-2)


def test_a_single_window_says_moments_and_divergences(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = open_model(str(tiny_model_dir))
    collect_statistics(model, windows_of(model, 1), "kl", tmp_path, seed=7, device="cpu")
    scales = Statistics.open(lambda name: tmp_path / "out" / name).scales
    assert set(scales) == {matrix.name for matrix in model.matrices}
    assert all(scale > 0 for scale in scales.values())


def test_divergences_that_are_known_are_not_measured_again(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(tiny_model_dir))
    real, measured = NextToken.divergences, []

    def stop_in_second_block(*args: Any) -> Tensor:
        measured.append(args)
        if len(measured) == 9:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(NextToken, "divergences", stop_in_second_block)
    with pytest.raises(KeyboardInterrupt):
        collect(model, tmp_path / "cut", "kl")
    resumed = collect(model, tmp_path / "cut", "kl")
    assert len(measured) == 9 + 7
    assert resumed.scales == collect(model, tmp_path / "whole", "kl").scales


def test_a_tail_takes_the_blocks_that_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = open_network(open_model(str(save_model(build_llama(num_layers=4), tmp_path / "model"))), "cpu", print)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    kept = tail._kept_bytes(network, 3, tokens[:1])
    hidden_bytes = 4 * tokens.shape[1] * network.network.config.hidden_size
    assert 10 * hidden_bytes < kept < 100 * hidden_bytes
    each = network.weight_bytes(3) + 1000 + kept
    for room, start in ((0, 3), (2 * each - 1, 3), (2 * each, 2), (4 * each - 1, 1), (4 * each, 0), (9 * each, 0)):
        monkeypatch.setattr(tail, "MOST_BYTES", room)
        assert tail.tail_of(network, tokens, lambda index: 1000) == range(start, 4)


def stopping_at(number: int) -> tuple[Any, list[int]]:
    """In the place of LayeredNetwork.block: stops at that call of it; and the blocks that were entered."""
    real, entered = LayeredNetwork.block, []

    def stop_once(self: LayeredNetwork, index: int) -> Any:
        entered.append(index)
        if len(entered) == number:
            raise KeyboardInterrupt
        return real(self, index)

    return stop_once, entered


@pytest.mark.parametrize("part_windows", [1, 2, 8])
@pytest.mark.parametrize("stop_at", [2, 3, 4, 6])
def test_finished_blocks_survive_an_interruption(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch, part_windows: int, stop_at: int
) -> None:
    """Of the two blocks, on the way there and back, the one that is stopped is done again and no other."""
    monkeypatch.setattr(summed_parts, "PART_WINDOWS", part_windows)
    monkeypatch.setattr(tail, "MOST_BYTES", 0)
    model = open_model(str(tiny_model_dir))
    stop_once, entered = stopping_at(stop_at)
    monkeypatch.setattr(LayeredNetwork, "block", stop_once)
    work = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        collect(model, work, "sequence")
    resumed = collect(model, work, "sequence")
    num_entered = len(entered)
    whole = collect(model, tmp_path / "whole", "sequence")
    assert num_entered == len(entered) - num_entered + 1
    for matrix in model.matrices:
        assert torch.equal(resumed.of(matrix).input_curvature, whole.of(matrix).input_curvature)


def test_a_part_that_was_saved_but_not_added_is_added(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """Killed between the two layers of the first part's files."""
    monkeypatch.setattr(summed_parts, "PART_WINDOWS", 2)
    model = open_model(str(tiny_model_dir))
    whole = collect(model, tmp_path / "whole")
    work, write = tmp_path / "cut", summed_parts.write_layer

    def stop_at_second_layer(path: Path, *others) -> None:
        if path.name == "layer-001.safetensors":
            raise KeyboardInterrupt
        write(path, *others)

    with monkeypatch.context() as patch:
        patch.setattr(summed_parts, "write_layer", stop_at_second_layer)
        with pytest.raises(KeyboardInterrupt):
            collect(model, work)
    resumed = collect(model, work)
    for matrix in model.matrices:
        assert torch.equal(resumed.of(matrix).fisher_diag, whole.of(matrix).fisher_diag)


def test_a_non_finite_activation_names_the_layer(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    read = Model.tensor

    def damaged(self: Model, name: str) -> torch.Tensor:
        tensor = read(self, name).clone()
        if name == "model.layers.1.post_attention_layernorm.weight":
            tensor[0] = torch.inf
        return tensor

    monkeypatch.setattr(Model, "tensor", damaged)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\b.*window 0"):
        collect(open_model(str(tiny_model_dir)), tmp_path)


@pytest.mark.parametrize("stop_at", [5, 7, 8, 11, 12, 14])
def test_more_room_after_an_interruption_changes_no_byte(tmp_path: Path, monkeypatch, stop_at: int) -> None:
    """With a block at a time, stopped on the way there or back, for the sums or their scale; then with all at once."""
    model = open_model(str(save_model(build_llama(num_layers=4), tmp_path / "model")))
    whole = collect(model, tmp_path / "whole", "kronecker")
    stop_once, _ = stopping_at(stop_at)
    work = tmp_path / "cut"
    with monkeypatch.context() as tight:
        tight.setattr(tail, "MOST_BYTES", 0)
        tight.setattr(LayeredNetwork, "block", stop_once)
        with pytest.raises(KeyboardInterrupt):
            collect(model, work, "kronecker")
    resumed = collect(model, work, "kronecker")
    assert resumed.scales == whole.scales
    for matrix in model.matrices:
        assert torch.equal(resumed.of(matrix).input_curvature, whole.of(matrix).input_curvature)


@pytest.mark.parametrize("metric", ["kronecker", "kl"])
def test_a_kill_while_scratch_files_are_removed_loses_no_scale(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch, metric: Metric
) -> None:
    model, real = open_model(str(tiny_model_dir)), shutil.rmtree
    whole = collect(model, tmp_path / "whole", metric)

    def cut_short(folder: Path, **options: Any) -> None:
        if folder.name != "scale":
            return real(folder, **options)
        for path in folder.glob("scales-*"):
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            collect(model, tmp_path / "cut", metric)
    assert collect(model, tmp_path / "cut", metric).scales == whole.scales
    assert not (tmp_path / "cut" / "scale").exists()
