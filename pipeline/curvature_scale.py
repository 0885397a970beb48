"""How large the curvature really is: its factors checked on windows that they were not made from.

The factors of a matrix neglect how tokens of a window act together, and fit the windows that they come from. Both make
the expected divergence too small, by more for some matrices than for others, which misleads the integer program.
So probes E = p q^T are drawn as rounding with feedback leaves its errors (white in the triangular basis of
quantizers/curvature.py), and what they do to the loss of other windows, with G the gradient of a window's loss for
labels drawn from the model,

    mean over windows and probes of <G, E>^2,    <G, E> = sum over tokens of (g . p) (x . q)

is set against what the factors expect of the same probes, tr(H_O E H_I E^T). The ratio is the matrix's scale.
H_O is the identity where a metric has none.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.atomic import write_json
from pipeline.degraded import say_if_degraded
from pipeline.layered import Network, matrices_of
from pipeline.layered_pass import on_gradient, there_and_back
from pipeline.model import Matrix, Model
from pipeline.progress import Progress
from pipeline.tail import tail_of
from pipeline.unreached import with_others_scales
from quantizers import LayerStatistics, TrellisCoded
from quantizers.hadamard import unrotate

NUM_PROBES = 64
LEAST, MOST = 0.1, 100.0  # a scale beyond is noise: it comes from a few windows


def measure_scales(
    network: Network,
    model: Model,
    statistics_of: Callable[[Matrix], LayerStatistics],
    tokens: Tensor,
    first: int,
    folder: Path,
    seed: int,
    progress: Progress,
) -> dict[str, float]:
    """The factor by which each matrix's `input_curvature` is to be multiplied, by parameter name.

    Args:
        statistics_of: both factors or the inputs' alone, in nats a token.
        tokens: [windows, seq_len], which the factors were not made from.
        first: number of the first of them.
        folder: made, for what passes between blocks and what is known of them; goes on from what is there.
        seed: of the labels and the probes.
        progress: is also told of matrices whose curvature cannot be factorized as it is.
    """
    folder.mkdir(exist_ok=True)
    numbers = {matrix.name: number for number, matrix in enumerate(model.matrices)}

    @contextmanager
    def at_blocks(blocks: range) -> Iterator[Callable[[], None]]:
        matrices = matrices_of(network, model, blocks)
        responses = {matrix.name: torch.zeros(NUM_PROBES, dtype=torch.float64) for matrix in matrices}
        responses = {name: response.to(network.device) for name, response in responses.items()}
        squares = dict.fromkeys(responses, 0.0)
        expected = {}

        def window_is_done() -> None:
            for name, response in responses.items():
                squares[name] += float(response.square().sum())
                response.zero_()

        with ExitStack() as stack:
            for matrix in matrices:
                learnt = statistics_of(matrix).to(str(network.device))
                sides = _probes(matrix, learnt, seed + numbers[matrix.name], progress.say)
                out, into = (side.double() for side in sides)
                by_rows, by_columns = _expected(learnt.output_curvature, out), _expected(learnt.input_curvature, into)
                expected[matrix.name] = float(by_rows @ by_columns)
                hook = _probing(out, into, responses[matrix.name])
                stack.callback(network.network.get_submodule(matrix.module).register_forward_hook(hook).remove)
            yield window_is_done
        num_tokens = len(tokens) * network.task.num_scored(tokens.shape[1])
        scales = {
            name: square / (2 * num_tokens) / expected[name] if expected[name] > 0 else 1.0
            for name, square in squares.items()
        }
        write_json(folder / f"scales-{blocks.start:03d}.json", scales)

    tail = tail_of(network, tokens, partial(_probe_bytes, network, model))
    passes = there_and_back(network, tokens, folder, at_blocks, tail=tail, first=first, label_seed=seed)
    for _ in progress.track(passes, "Scale of the curvature", total=2 * network.num_blocks * len(tokens)):
        pass
    found: dict[str, float] = {}
    for path in sorted(folder.glob("scales-*.json")):
        found |= json.loads(path.read_text())
    return {name: min(max(scale, LEAST), MOST) for name, scale in with_others_scales(found).items()}


def _probe_bytes(network: Network, model: Model, block: int) -> int:
    return sum(8 * NUM_PROBES * sum(matrix.shape) for matrix in matrices_of(network, model, [block]))


def _probes(matrix: Matrix, learnt: LayerStatistics, seed: int, say: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """p [out, probes] and q [in, probes]. Where no factor is of the outputs, they are white there in any basis."""
    rounding = TrellisCoded(2)
    assert learnt.input_curvature is not None
    sides = rounding.sides(matrix.shape, learnt, learnt.input_curvature.device)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size, factor, rotation, side in (
        (matrix.shape[0], sides.outputs, rounding.seed, "outputs"),
        (matrix.shape[1], sides.inputs, rounding.seed + 1, "inputs"),
    ):
        white = torch.randn(size, NUM_PROBES, generator=generator).to(learnt.input_curvature.device)
        if factor is None:
            found.append(white)
            continue
        say_if_degraded(matrix.name, side, factor, say)
        probes = torch.linalg.solve_triangular(factor.unit_upper.T, white, upper=False, unitriangular=True)
        found.append(unrotate(probes.T.contiguous(), rotation).T.contiguous())
    return found[0], found[1]


def _expected(curvature: Tensor | None, probes: Tensor) -> Tensor:
    """p^T H p of each of the probes [n, probes]; H is the identity where there is none."""
    return ((probes if curvature is None else curvature.double() @ probes) * probes).sum(dim=0)


def _probing(out: Tensor, into: Tensor, response: Tensor):
    def on_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        along = inputs[0].detach().double().reshape(-1, len(into)) @ into

        def on_backward(gradient: Tensor) -> None:
            response.add_(((gradient.double().reshape(-1, len(out)) @ out) * along).sum(dim=0))

        return on_gradient(output, on_backward)

    return on_forward
