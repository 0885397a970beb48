"""A copy of a model in float32, for CPUs that have to emulate bfloat16.

Peers compute in the dtype that they find. Without AVX512-BF16 or AMX a product in bfloat16 takes six times as long as
one in float32 (two AVX2 cores), and GPTQ half an hour where it takes minutes.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def is_bfloat16_emulated() -> bool:
    """Has this CPU no products in bfloat16?"""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def float32_copy(model: Path, folder: Path) -> Path:
    """`model` where its dtype is fast here, else its copy in `folder`, which is written unless it is there."""
    config = json.loads((model / "config.json").read_text())
    if config.get("dtype") != "bfloat16" or not is_bfloat16_emulated():
        return model
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(model.iterdir()):
        if path.suffix == ".safetensors":
            tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
            save_file(tensors, folder / path.name, {"format": "pt"})
        elif path.is_file() and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder
