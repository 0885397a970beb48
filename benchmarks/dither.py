"""A copy of a model whose weights no longer lie on the grid of a 4-bit format.

The demo model comes from a GGUF in Q4_1: within a block of 32 all weights are minimum + code * step. An integer
quantizer of 4 bits with aligned blocks gets them back without any error, which no other model allows. So every weight
is moved by a uniform draw of one step, from half a step down to half a step up.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.model import Model

BLOCK_SIZE = 32
CODES = 15  # steps between the smallest and the largest weight of a block


def dithered_copy(model: Model, parent: Path) -> Path:
    """Write the copy into a folder of its own below `parent`, unless it is there; returns it."""
    folder = parent / f"{Path(model.spec).name}-{model.digest[:12]}"
    if (folder / "done.json").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model.path, folder)
    names = {matrix.name for matrix in model.matrices}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for index, name in enumerate(sorted(names & tensors.keys())):
            tensors[name] = dithered(tensors[name], seed=index)
        save_file(tensors, path, metadata)
    (folder / "done.json").write_text(json.dumps({"of": model.digest}))
    return folder


def dithered(weight: Tensor, seed: int) -> Tensor:
    """`weight` [out, in] plus uniform noise of one step of its block, in its own dtype."""
    padded = torch.nn.functional.pad(weight.float(), (0, -weight.shape[-1] % BLOCK_SIZE), mode="replicate")
    blocks = padded.reshape(-1, BLOCK_SIZE)
    step = (blocks.amax(dim=1, keepdim=True) - blocks.amin(dim=1, keepdim=True)) / CODES
    noise = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return (blocks + noise * step).view(padded.shape)[:, : weight.shape[-1]].to(weight.dtype).contiguous()
