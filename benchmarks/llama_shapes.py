"""Llamas of any size with made-up weights, written layer by layer, a shard each, in bfloat16.

Weights are normal, with a scale for each row and each column that varies as in trained models, and a few input columns
that are several times larger.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.safetensors_file import SafetensorsFile, TensorSpec
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


def write_llama(folder: Path, shape: Shape, tokenizer_of: Path, *, seed: int = 0, headers_only: bool = False) -> Path:
    """A folder as transformers writes it; the memory of one layer is enough.

    Args:
        tokenizer_of: a model's folder, whose tokenizer and vocabulary it gets.
        headers_only: with holes in the place of weights, which take no disk; for what reads none, as a forecast.
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
    generator, index = torch.Generator().manual_seed(seed), {}
    for number, shapes in enumerate(_shards(shape, vocab_size)):
        file = f"model-{number + 1:05d}-of-{shape.num_layers + 1:05d}.safetensors"
        if headers_only:
            layout = SafetensorsFile.of(TensorSpec(name, torch.bfloat16, size) for name, size in shapes.items())
            (folder / file).write_bytes(layout.header)
            os.truncate(folder / file, layout.size_bytes)
        else:
            tensors = {name: _weight(name, size, generator) for name, size in shapes.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    return folder


def _shards(shape: Shape, vocab_size: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Name and shape of each tensor: a layer a shard, and one for what is around them."""
    width, inner = shape.width, shape.inner
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{kind}_proj": (width, width) for kind in "qkvo"}
        shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        shapes |= {f"{name}_layernorm": (width,) for name in ("input", "post_attention")}
        yield {f"{prefix}.{name}.weight": size for name, size in shapes.items()}
    yield {
        "model.embed_tokens.weight": (vocab_size, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab_size, width),
    }


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    if "embed_tokens" in name:
        return (STD * torch.randn(shape, generator=generator)).bfloat16()
    return matrix(shape, generator)


def matrix(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    rows, columns = shape
    weight = torch.randn(shape, generator=generator).mul_(STD)
    weight *= (SPREAD * torch.randn(rows, 1, generator=generator)).exp_()
    scales = (SPREAD * torch.randn(columns, generator=generator)).exp_()
    scales[torch.randperm(columns, generator=generator)[: round(OUTLIERS * columns)]] *= OUTLIER_SCALE
    return weight.mul_(scales).bfloat16()
