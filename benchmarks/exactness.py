"""How exact the streamed statistics are: against plain autograd over the whole model at once.

    python -m benchmarks.exactness [--model MODEL]

Of each matrix, the norm of the difference over the norm of what autograd says; the last line has the largest.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import tail
from pipeline.calibration import token_windows
from pipeline.curvature_sums import Metric, sums_of
from pipeline.display import Bars
from pipeline.layered import open_network
from pipeline.model import Model, open_model
from pipeline.part_sums import collect_part
from pipeline.task import drawn_labels

METRICS: tuple[Metric, ...] = ("fisher", "kronecker", "sequence")
NUM_WINDOWS, SEQ_LEN, SEED = 2, 128, 0


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    model = open_model(parser.parse_args().model)
    tokens = token_windows(None, model.tokenizer(), num_windows=NUM_WINDOWS, seq_len=SEQ_LEN, seed=SEED).tokens
    print("| metric | blocks at once | matrices | median | largest | of |\n| --- | --: | --: | --: | --: | --- |")
    largest = 0.0
    for metric in METRICS:
        expected = _by_autograd(model, tokens, metric)
        for most_bytes, at_once in ((0, "1"), (tail.MOST_BYTES, "all that fit")):
            tail.MOST_BYTES = most_bytes
            errors = _errors(model, tokens, metric, expected)
            name = max(errors, key=lambda each: errors[each])
            median = sorted(errors.values())[len(errors) // 2]
            print(
                f"| {metric} | {at_once} | {len(model.matrices)} | {median:.1e} | {errors[name]:.1e} | {name} |",
                flush=True,
            )
            largest = max(largest, errors[name])
    print(f"\nlargest relative difference from autograd: {largest:.1e}")


def _by_autograd(model: Model, tokens: Tensor, metric: Metric) -> dict[str, Tensor]:
    """The sums by the names that collect_part gives them, in float64 from one backward pass over all of the model."""
    kind, network = sums_of(metric), model.load()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for matrix in model.matrices:

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = matrix.name) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        network.get_submodule(matrix.module).register_forward_hook(keep)
    sums = {
        f"{matrix.name}.{name}": torch.zeros(shape, dtype=torch.float64)
        for matrix in model.matrices
        for name, shape in kind.shapes(matrix.shape).items()
    }
    for index, window in enumerate(Bars().track(tokens, "Autograd", total=len(tokens))):
        seen.clear()
        logits = network(window[None], use_cache=False).logits[0, :-1]
        labels = drawn_labels(logits.detach(), SEED + index) if kind.labels_are_drawn else window[1:]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for matrix in model.matrices:
            if matrix.name in seen:  # an expert that was reached
                x, output = seen[matrix.name]
                assert output.grad is not None
                held = {name: sums[f"{matrix.name}.{name}"] for name in kind.shapes(matrix.shape)}
                rows, columns = matrix.shape
                kind.add(held, x.reshape(-1, columns).double(), output.grad.reshape(-1, rows).double())
    return sums


def _errors(model: Model, tokens: Tensor, metric: Metric, expected: dict[str, Tensor]) -> dict[str, float]:
    """By matrix."""
    kind, network = sums_of(metric), open_network(model, "cpu", print)
    errors: dict[str, float] = {}
    found: dict[int, dict[str, torch.Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        steps = collect_part(network, model, tokens, 0, kind, Path(folder), found.__setitem__, seed=SEED)
        for _ in Bars().track(steps, metric, total=2 * network.num_blocks * len(tokens)):
            pass
    for matrix in model.matrices:
        for name in kind.shapes(matrix.shape):
            key = f"{matrix.name}.{name}"
            error = (found[matrix.layer][key] - expected[key]).norm() / expected[key].norm().clamp_min(1e-300)
            errors[matrix.module] = max(errors.get(matrix.module, 0.0), float(error))
    return errors


if __name__ == "__main__":
    main()
