"""Llamas of any size with made-up weights, written layer by layer, a shard each, in bfloat16.

Weights are normal, with a scale for each row and each column that varies as in trained models, and a few input columns
that are several times larger.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.sources import EXTRA_FILES

STD = 0.02
SPREAD = 0.3  # of the logarithms of rows' and columns' scales
OUTLIERS, OUTLIER_SCALE = 0.002, 6.0


@dataclass(frozen=True)
class Shape:
    """Of a Llama without grouped queries, and with a head of its own."""

    width: int
    inner: int
    num_layers: int
    num_heads: int

    def num_params(self, vocab_size: int) -> int:
        """With embeddings, head and norms."""
        layer = 4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width
        return self.num_layers * layer + 2 * vocab_size * self.width + self.width


SHAPES = {
    "1.3B": Shape(2048, 5504, 24, 16),
    "7B": Shape(4096, 11008, 32, 32),
    "13B": Shape(5120, 13824, 40, 40),
    "70B": Shape(8192, 28672, 80, 64),
}


def write_llama(folder: Path, shape: Shape, tokenizer_of: Path, *, seed: int = 0) -> Path:
    """A folder as transformers writes it; the memory of one layer is enough.

    Args:
        tokenizer_of: a model's folder, whose tokenizer and vocabulary it gets.
    """
    folder.mkdir(parents=True)
    for pattern in EXTRA_FILES:
        for path in tokenizer_of.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    vocab_size = json.loads((tokenizer_of / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(shape, vocab_size, generator, folder))
    index = {name: file for file, names in shards for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    return folder


def _shards(shape: Shape, vocab_size: int, generator: torch.Generator, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Write them; their files and the names in each."""

    def write(number: int, tensors: dict[str, Tensor]) -> tuple[str, list[str]]:
        file = f"model-{number + 1:05d}-of-{shape.num_layers + 1:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return file, list(tensors)

    width, inner = shape.width, shape.inner
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        shapes = {f"self_attn.{kind}_proj": (width, width) for kind in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        tensors = {f"{prefix}.{name}.weight": _matrix(size, generator) for name, size in shapes.items()}
        norms = {f"{prefix}.{name}_layernorm.weight": _ones(width) for name in ("input", "post_attention")}
        yield write(layer, tensors | norms)
    yield write(
        shape.num_layers,
        {
            "model.embed_tokens.weight": (STD * torch.randn(vocab_size, width, generator=generator)).bfloat16(),
            "model.norm.weight": _ones(width),
            "lm_head.weight": _matrix((vocab_size, width), generator),
        },
    )


def _matrix(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    rows, columns = shape
    weight = torch.randn(shape, generator=generator).mul_(STD)
    weight *= (SPREAD * torch.randn(rows, 1, generator=generator)).exp_()
    scales = (SPREAD * torch.randn(columns, generator=generator)).exp_()
    scales[torch.randperm(columns, generator=generator)[: round(OUTLIERS * columns)]] *= OUTLIER_SCALE
    return weight.mul_(scales).bfloat16()


def _ones(width: int) -> Tensor:
    return torch.ones(width, dtype=torch.bfloat16)
