"""A Llama of 7 billion parameters on a GPU: tokens a second packed, as NF4 and dense, and the seconds to decompose it.

    python -m benchmarks.gpu_model [--shape 7B] [--layers 32] [--only generation decomposition]
    python -m benchmarks.gpu_model --dry-run        on any machine, a tiny model without a graph: does it all run?

Weights are made up (random codes, llama_shapes.py), for neither takes longer with others. Generation is a step of
greedy decoding after a prompt of 32 tokens with a static cache, in one CUDA graph: no launch costs, no Python.
Decomposition is the stage of `compress --device cuda`, from what is in the machine's memory to files, with both factors
of a made-up curvature for each matrix as the default recipe has; the last row has that recipe's largest low-rank part.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from benchmarks.llama_shapes import SHAPES, Shape, matrix
from pipeline.decompose import QuantizeMatrix, read_error
from pipeline.model import Matrix
from pipeline.spread_gpus import over_gpus
from quantizers import LayerStatistics, QuantizedLinear, quantizer_from_label, weighted_error
from quantizers.kernels.switch import KERNELS

LABELS = ("lloyd4-g64-s8", "lloyd3-g64-s8", "lloyd2-g64-s8", "trellis4-l12", "trellis3-l12", "trellis2-l12")
DECOMPOSED = ("lloyd3-g64-s8", "trellis3-l12", "trellis3-l12-r8-f4")
NUM_KINDS = 7  # of matrices in a layer
SEQUENCES = (1, 16)
VOCABULARY = 32_000
PROMPT_TOKENS, STEPS = 32, 64
TINY = Shape(64, 192, 2, 4)
CURVATURE_ROWS = 4096  # samples of a made-up curvature
PARTS = ("generation", "decomposition")
DENSE = "dense, bfloat16"  # float32 in a dry run
NO_GPU = "this measures a CUDA device, and torch finds none here; `--dry-run` runs a tiny model without one"


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7B")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dry-run", action="store_true")
    asked = parser.parse_args(arguments)
    if not asked.dry_run and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    device = "cpu" if asked.dry_run else "cuda"
    shape = TINY if asked.dry_run else SHAPES[asked.shape]
    num_layers = asked.layers or shape.num_layers
    card = "a dry run, whose times mean nothing" if device == "cpu" else torch.cuda.get_device_name()
    model = f"{num_layers} layers of a {'tiny Llama' if asked.dry_run else asked.shape}"
    print(f"\n### {model}, {card}, {date.today()}, torch {torch.__version__}")
    if "generation" in asked.only:
        print_generation(shape, num_layers, device)
    if "decomposition" in asked.only:
        print_decomposition(shape, num_layers, "cpu" if asked.dry_run else "cuda:0")  # cuda would be all of them


def print_generation(shape: Shape, num_layers: int, device: str) -> None:
    """A table; each row's network takes the place of the one before."""
    columns = " | ".join(f"tokens/s, {count} at once | of dense" for count in SEQUENCES)
    print(f"\n| weights | GB | {columns} |\n| --- | --: | {' | '.join(['--:'] * 2 * len(SEQUENCES))} |")
    network = dense_network(shape, num_layers, device)
    dense: dict[int, float] = {}
    for name in (DENSE, "NF4, bitsandbytes", *LABELS):
        try:
            if name in LABELS:
                pack(network, name)
            elif name.startswith("NF4"):
                to_nf4(network)
            gigabytes = stored_bytes(network) / 1e9  # before a product, which may put codes elsewhere
            cells = []
            for count in SEQUENCES:
                speed = count / step_seconds(network, count)
                if name == DENSE:
                    dense[count] = speed
                cells.append(f"{speed:.1f} | {speed / dense[count]:.2f}x")
            check_kernels()
            print(f"| {name} | {gigabytes:.2f} | {' | '.join(cells)} |", flush=True)
        except Exception as error:  # a peer that fails must not cost the rest of the table
            if name != "NF4, bitsandbytes":
                raise
            print(f"| {name} | failed: {type(error).__name__}: {str(error)[:80]} |", flush=True)


def dense_network(shape: Shape, num_layers: int, device: str) -> PreTrainedModel:
    """With random weights, in bfloat16 on a GPU and float32 on a CPU."""
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    config.dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        network = LlamaForCausalLM._from_config(config)
    return network.requires_grad_(False).eval()


def stored_bytes(network: PreTrainedModel) -> int:
    """Of its parameters and buffers, and of what bitsandbytes keeps beside them."""
    states = [each.quant_state for each in network.parameters() if getattr(each, "quant_state", None) is not None]
    scales = sum(state.absmax.nbytes for state in states)
    scales += sum(state.state2.absmax.nbytes + state.offset.nbytes for state in states if state.nested)
    return scales + sum(each.nbytes for each in (*network.parameters(), *network.buffers()))


def check_kernels() -> None:
    """Torch does what a kernel fails at, and would be measured under its name.

    Raises:
        SystemExit: one failed.
    """
    if KERNELS.failure is not None:
        sys.exit(f"kernels failed, nothing more is measured: {KERNELS.failure}")


def linear_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All but the head."""
    for name, module in list(network.named_modules()):
        if hasattr(module, "in_features") and not name.endswith("lm_head"):
            yield name, module


def pack(network: PreTrainedModel, label: str) -> None:
    """Put a packed layer of random codes in the place of each."""
    form = quantizer_from_label(label).format
    for name, module in linear_layers(network):
        size = (int(module.out_features), int(module.in_features))  # type: ignore[arg-type]
        with torch.device(network.device):
            layer = QuantizedLinear(size, form, bias=False, dtype=network.dtype)
            generator = torch.Generator(network.device).manual_seed(0)
            for stored in layer.buffers():
                if stored.dtype == torch.float32:
                    stored.fill_(1e-4)
                else:
                    stored.random_(generator=generator)
                    stored.view(-1)[-1:] = 0  # the bits after the last code
        layer.set_levels(form.levels)
        network.set_submodule(name, layer)


def to_nf4(network: PreTrainedModel) -> None:
    """bitsandbytes' layers, which quantize random weights when they move to the GPU."""
    import bitsandbytes

    for name, module in linear_layers(network):
        layer = bitsandbytes.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=network.dtype,
            quant_type="nf4",
            device="cpu",
        )
        nn.init.normal_(layer.weight.data, std=0.02)
        layer.weight.data = layer.weight.data.to(network.dtype)  # as loaded in it: what a product of rows makes dense
        network.set_submodule(name, layer.to(network.device))


class Decoding:
    """A step of greedy decoding: the same token at the next place of a static cache, again and again."""

    def __init__(self, network: PreTrainedModel, num_sequences: int) -> None:
        self.network = network
        prompt = torch.arange(PROMPT_TOKENS, device=network.device).expand(num_sequences, -1)
        self.cache = StaticCache(config=network.config, max_cache_len=PROMPT_TOKENS + 4 * STEPS)
        network(prompt, past_key_values=self.cache)
        self.token = torch.full((num_sequences, 1), 100, device=network.device)
        self.place = torch.full((num_sequences, 1), PROMPT_TOKENS, device=network.device)

    def step(self) -> Tensor:
        """Logits [sequence, 1, vocabulary]."""
        return self.network(self.token, position_ids=self.place, past_key_values=self.cache).logits


@torch.inference_mode()
def step_seconds(network: PreTrainedModel, num_sequences: int) -> float:
    """Of one step, the mean of `STEPS` that follow one another, after a few."""
    decoding = Decoding(network, num_sequences)
    run: Callable[[], object] = decoding.step
    decoding.step()
    _wait(network.device)
    if network.device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):  # what is made in a first call may not be made in a graph
            decoding.step()
        _wait(network.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decoding.step()
        run = graph.replay
    run()
    _wait(network.device)
    started = time.monotonic()
    for _ in range(STEPS):
        run()
    _wait(network.device)
    return (time.monotonic() - started) / STEPS


def print_decomposition(shape: Shape, num_layers: int, device: str) -> None:
    """A table; what the stage decompose does, a batch of matrices at once in streams, and files that are written."""
    print("\n| codes | seconds | million weights a second | error, of that without codes |\n| --- | --: | --: | --: |")
    made_up = MadeUp(shape, device)
    matrices = made_up.matrices(num_layers)
    num_params = sum(matrix.num_params for matrix in matrices)
    whole_of = made_up.whole_errors()
    whole = sum(whole_of[matrix.shape] for matrix in matrices)
    for label in DECOMPOSED:
        _decompose(made_up, matrices[:NUM_KINDS], label, device)  # compiles
        seconds, error = _decompose(made_up, matrices, label, device)
        check_kernels()
        left = f"{error / whole:.2g}"
        print(f"| {label} | {seconds:.1f} | {num_params / seconds / 1e6:.2f} | {left} |", flush=True)


def _decompose(made_up: "MadeUp", matrices: list[Matrix], label: str, device: str) -> tuple[float, float]:
    """Seconds, and the error of all."""
    labels = {matrix.module: label for matrix in matrices}
    with tempfile.TemporaryDirectory(prefix="bitsmith-gpu-") as folder:
        task = QuantizeMatrix(made_up, labels, made_up, Path(folder), device)  # type: ignore[arg-type]
        started = time.monotonic()
        for _ in over_gpus(task, matrices):
            pass
        seconds = time.monotonic() - started
        return seconds, sum(read_error(task.file(matrix)) for matrix in matrices)


class MadeUp:
    """In the place of a model and of its statistics: one weight for each shape, and one curvature for each width.

    Which they are decides nothing that takes time. They are in the machine's memory, as what is read from files.
    """

    metric = "kronecker"

    def __init__(self, shape: Shape, device: str) -> None:
        width, inner, self._device = shape.width, shape.inner, device
        generator = torch.Generator().manual_seed(0)
        self._curvatures = {size: _curvature(size, device) for size in (width, inner)}
        self._weights = {
            size: matrix(size, generator).float() for size in ((width, width), (inner, width), (width, inner))
        }
        self._kinds = (*[(width, width)] * 4, *[(inner, width)] * 2, (width, inner))

    def matrices(self, num_layers: int) -> list[Matrix]:
        """The seven of each layer."""
        return [
            Matrix(f"{layer}.{kind}.weight", f"{layer}.{kind}", size, False, "F32", layer, str(kind), f"{layer}.{kind}")
            for layer in range(num_layers)
            for kind, size in enumerate(self._kinds)
        ]

    def whole_errors(self) -> dict[tuple[int, int], float]:
        """Without any codes, by shape."""
        return {
            each.shape: weighted_error(self.weight(each).to(self._device), self.of(each).to(self._device))
            for each in self.matrices(1)
        }

    def weight(self, asked: Matrix) -> Tensor:
        """As pipeline.model.Model gives it."""
        return self._weights[asked.shape]

    def of(self, asked: Matrix) -> LayerStatistics:
        """As pipeline.statistics.Statistics gives it."""
        outputs, inputs = (self._curvatures[size] for size in asked.shape)
        return LayerStatistics(input_curvature=inputs, output_curvature=outputs)


def _curvature(size: int, device: str) -> Tensor:
    """A second moment of correlated samples, float32 [size, size]."""
    generator = torch.Generator(device).manual_seed(size)
    samples = torch.randn(CURVATURE_ROWS, size, generator=generator, device=device)
    samples += 0.3 * torch.randn(CURVATURE_ROWS, 1, generator=generator, device=device)
    return (samples.T @ samples / CURVATURE_ROWS).cpu()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
