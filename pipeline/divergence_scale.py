"""How large the curvature really is, without a backward pass: each matrix is disturbed, and the divergence measured.

The second moment H_I of a matrix's inputs says how errors of its output add up, and not what they do to the model. So
the weight gets an error E of white noise, a tenth of its own size, and

    mean over tokens of KL(original || disturbed) / tr(E H_I E^T)

is the matrix's scale: with it a weighted error is the expected divergence in nats a token, as with the metrics that
need gradients. Blocks below the matrix are passed once for all; those above once for each matrix, with the weights of
one block in memory.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.atomic import write_json
from pipeline.layered import Network, matrices_of
from pipeline.layered_pass import forward, hidden_file, read_windows
from pipeline.model import Matrix, Model
from pipeline.progress import Progress
from pipeline.unreached import with_others_scales
from quantizers import LayerStatistics, weighted_error

ERROR_SHARE = 0.1  # of the weight's root mean square: about what four bits leave
MATRICES_AT_ONCE = 32  # whose windows are held: all of a block, or of a mixture's some
MOST_WINDOWS = 2  # hundreds of tokens each, over which a divergence is a mean already


def measure_divergences(
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
        statistics_of: the mean over tokens of x x^T.
        tokens: [windows, seq_len], of which MOST_WINDOWS are read.
        first: number of the first of them.
        folder: made, for what passes between blocks and what is known of them; goes on from what is there.
        seed: of the errors.
    Raises:
        NonFiniteError: a block gives a NaN or an infinity.
    """
    folder.mkdir(exist_ok=True)
    tokens = tokens[:MOST_WINDOWS]
    for _ in forward(network, tokens, folder, first=first, stop=network.num_blocks):
        pass
    seeds = {matrix.name: seed + number for number, matrix in enumerate(model.matrices)}
    ends = read_windows(folder / hidden_file(network.num_blocks), network)
    original = [_answer(network, window, hidden) for window, hidden in zip(tokens, ends, strict=True)]

    def scales_at(index: int) -> Iterator[tuple[str, float]]:
        for matrix, answers in _answers(network, model, index, tokens, folder, seeds):
            divergences = [
                float(network.task.divergences(before, _answer(network, window, hidden)).mean())
                for before, window, hidden in zip(original, tokens, answers, strict=True)
            ]
            expected = weighted_error(_error(model, matrix, seeds[matrix.name]), statistics_of(matrix))
            mean = max(sum(divergences) / len(divergences), 0.0)
            yield matrix.name, mean / expected if expected > 0 else 1.0

    def measured() -> Iterator[tuple[str, float]]:
        for index in range(network.num_blocks):
            known = folder / f"scales-{index:03d}.json"
            if known.exists():
                yield from json.loads(known.read_text()).items()
                continue
            scales = {}
            for name, scale in scales_at(index):
                scales[name] = scale
                yield name, scale
            write_json(known, scales)

    with torch.no_grad():
        found = dict(progress.track(measured(), "Divergence by matrix", total=len(model.matrices)))
    return with_others_scales(found)


def _answers(
    network: Network, model: Model, index: int, tokens: Tensor, folder: Path, seeds: dict[str, int]
) -> Iterator[tuple[Matrix, list[Tensor]]]:
    """What the last block gives for each window, with each of the matrices of block `index` disturbed in turn."""

    def through(block: int, windows: list[Tensor]) -> list[Tensor]:
        return [network.through(block, token[None], hidden) for token, hidden in zip(tokens, windows, strict=True)]

    def disturbed() -> Iterator[tuple[Matrix, list[Tensor]]]:
        before = read_windows(folder / hidden_file(index), network)
        with network.block(index):
            for matrix in matrices_of(network, model, [index]):
                error = _error(model, matrix, seeds[matrix.name]).to(network.device)
                with _disturbed(network.network.get_submodule(matrix.module), error.T if matrix.transposed else error):
                    answer = through(index, before)
                yield matrix, answer

    if index == network.num_blocks - 1:
        yield from disturbed()  # one by one, for these may be answers
        return
    answers = disturbed()
    while passed := dict(islice(answers, MATRICES_AT_ONCE)):
        for above in range(index + 1, network.num_blocks):
            with network.block(above):
                passed = {matrix: through(above, windows) for matrix, windows in passed.items()}
        yield from passed.items()


def _error(model: Model, matrix: Matrix, seed: int) -> Tensor:
    weight = model.weight(matrix)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(matrix.shape, generator=generator) * (ERROR_SHARE * float(weight.square().mean().sqrt()))


@contextmanager
def _disturbed(layer: nn.Module, error: Tensor) -> Iterator[None]:
    weight = layer._parameters["weight"]
    assert weight is not None
    layer._parameters["weight"] = nn.Parameter(weight + error, requires_grad=False)
    try:
        yield
    finally:
        layer._parameters["weight"] = weight


def _answer(network: Network, window: Tensor, hidden: Tensor) -> Tensor:
    """float32 [scored, n]."""
    return network.head(window[None], hidden)[0].float()
