"""How large the curvature really is: Kronecker factors checked on windows that they were not made from.

The factors of a matrix neglect how tokens of a window act together, and fit the windows that they come from. Both make
the expected divergence too small, by more for some matrices than for others, which misleads the integer program.
So probes E = p q^T are drawn as rounding with feedback leaves its errors (white in the triangular basis of
quantizers/curvature.py), and what they do to the loss of other windows, with G the gradient of a window's loss for
labels drawn from the model,

    mean over windows and probes of <G, E>^2,    <G, E> = sum over tokens of (g . p) (x . q)

is set against what the factors expect of the same probes, tr(H_O E H_I E^T). The ratio is the matrix's scale.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from pipeline.degraded import say_if_degraded
from pipeline.model import Matrix, Model
from quantizers import LayerStatistics, TrellisCoded
from quantizers.hadamard import unrotate

NUM_PROBES = 64
LEAST, MOST = 0.1, 100.0  # a scale beyond is noise: it comes from a few windows


def measure_scales(
    network: nn.Module,
    model: Model,
    statistics_of: Callable[[Matrix], LayerStatistics],
    run_windows: Callable[[], Iterable[int]],
    *,
    seed: int,
    device: str,
    say: Callable[[str], None],
) -> dict[str, float]:
    """The factor by which each matrix's `input_curvature` is to be multiplied, by parameter name.

    Args:
        statistics_of: Kronecker factors, in nats a token.
        run_windows: passes windows forward and backward through `network`, one after the other, and yields the number
            of tokens of each when it is through.
        say: is told of matrices whose curvature cannot be factorized as it is.
    """
    probes, expected = {}, {}
    for index, matrix in enumerate(model.matrices):
        learnt = statistics_of(matrix).to(device)
        out, into = (side.double() for side in _probes(matrix, learnt, seed + index, say))
        probes[matrix.name] = out, into
        assert learnt.input_curvature is not None
        assert learnt.output_curvature is not None
        by_rows = (learnt.output_curvature.double() @ out * out).sum(dim=0)
        expected[matrix.name] = float(by_rows @ (learnt.input_curvature.double() @ into * into).sum(dim=0))
    responses = {matrix.name: torch.zeros(NUM_PROBES, dtype=torch.float64, device=device) for matrix in model.matrices}
    squares = {matrix.name: 0.0 for matrix in model.matrices}
    num_tokens = 0
    with ExitStack() as stack:
        for matrix in model.matrices:
            hook = _probing(*probes[matrix.name], responses[matrix.name])
            stack.callback(network.get_submodule(matrix.module).register_forward_hook(hook).remove)
        for window_tokens in run_windows():
            num_tokens += window_tokens
            for name, response in responses.items():
                squares[name] += float(response.square().sum())
                response.zero_()
    return {
        name: min(max(squares[name] / (2 * num_tokens) / expected[name], LEAST), MOST) if expected[name] > 0 else 1.0
        for name in squares
    }


def _probes(matrix: Matrix, learnt: LayerStatistics, seed: int, say: Callable[[str], None]) -> tuple[Tensor, Tensor]:
    """p [out, probes] and q [in, probes]."""
    rounding = TrellisCoded(2)
    assert learnt.input_curvature is not None
    sides = rounding.sides(matrix.shape, learnt, learnt.input_curvature.device)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for factor, rotation, side in (
        (sides.outputs, rounding.seed, "outputs"),
        (sides.inputs, rounding.seed + 1, "inputs"),
    ):
        assert factor is not None
        say_if_degraded(matrix.name, side, factor, say)
        white = torch.randn(len(factor.pivots), NUM_PROBES, generator=generator).to(factor.pivots.device)
        probes = torch.linalg.solve_triangular(factor.unit_upper.T, white, upper=False, unitriangular=True)
        found.append(unrotate(probes.T.contiguous(), rotation).T.contiguous())
    return found[0], found[1]


def _probing(out: Tensor, into: Tensor, response: Tensor):
    def on_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        along = inputs[0].detach().double().reshape(-1, len(into)) @ into

        def on_backward(gradient: Tensor) -> None:
            response.add_(((gradient.double().reshape(-1, len(out)) @ out) * along).sum(dim=0))

        output.register_hook(on_backward)

    return on_forward
