"""Proof, in a fresh process, that a written folder is what the plan promised.

Loads the folder as any user would, checks that every planned matrix is there packed, with exactly the planned
bytes, and that nothing was missing or left over, then stores the answer to a fixed prompt. The caller compares
them with those of the model in its own memory: what was tested is what will be served.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import CheckpointError
from pipeline.packed import load_packed
from pipeline.task import task_of
from quantizers import QuantizedLinear
from quantizers.embedding import PackedRows

LARGEST_DIFFERENCE = 1e-3  # of the answer, relative to its range: rounding, not damage
NUM_TOKENS = 32
TRUSTED = "trust-remote-code"  # the fresh process's third argument


def audit(folder: Path, expected: Tensor, *, trust_remote_code: bool = False) -> None:
    """Load `folder` in a fresh process and compare its answer with `expected`: `fixed_answer` of the model in memory.

    Args:
        trust_remote_code: run the code that the original brings; see pipeline/own_code.py.
    Raises:
        CheckpointError: a tensor is missing, has other bytes than planned, or the answers differ.
    """
    reloaded = answer_in_fresh_process(folder, trust_remote_code=trust_remote_code)
    difference = float((reloaded - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not difference <= LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"The written checkpoint {folder} gives another answer than the model in memory (relative difference "
            f"{difference:.2g}, expected at most {LARGEST_DIFFERENCE}). Nothing was published. Run the command again; "
            "if it fails again, start over with --no-resume."
        )


def answer_in_fresh_process(folder: Path, *, trust_remote_code: bool = False) -> Tensor:
    """`fixed_answer` of the folder, loaded and checked by a process that knows nothing of this one.

    Raises:
        CheckpointError: with the last line of what that process said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer.safetensors"
        # This process's own path: with -m, a folder named `pipeline` where the user stands would win.
        script = f"import sys; sys.path[:] = {sys.path!r}; from pipeline.audit import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", script, str(folder), str(answer), *[TRUSTED] * trust_remote_code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
            raise CheckpointError(
                f"The written checkpoint {folder} does not load in a fresh process: {reason}. Nothing was published. "
                "Run the command again; if it fails again, start over with --no-resume."
            )
        return load_file(answer)["answer"]


@torch.inference_mode()
def fixed_answer(model: PreTrainedModel) -> Tensor:
    """float32 [scored, n], the answer (task.py) to a fixed sequence of token ids."""
    vocab = model.config.get_text_config().vocab_size
    ids = torch.arange(1, NUM_TOKENS + 1) * 7919 % vocab
    task = task_of(model.config)
    return task.answer(model, task.inputs(ids[None].to(model.device)))[0].float().cpu()


def load_checked(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a folder packed, on the CPU in float32, and check it against its plan.

    Raises:
        CheckpointError: what is there is not what was planned.
    """
    model = load_packed(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    plan = json.loads((folder / "plan.json").read_text())
    for name, planned in (plan["matrices"] | plan.get("embeddings", {})).items():
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantizedLinear | PackedRows):
            raise CheckpointError(f"{name} was planned as {planned['label']}, and {folder} holds it uncompressed")
        if layer.quantized().size_bits != planned["size_bits"]:
            raise CheckpointError(
                f"{name} was planned with {planned['size_bits']} bits, and {layer.quantized().size_bits} are stored"
            )
    return model


def main(arguments: list[str]) -> None:
    """The fresh process: check the folder, leave the answer."""
    folder, answer = map(Path, arguments[:2])
    loaded = load_checked(folder, trust_remote_code=TRUSTED in arguments[2:])
    save_file({"answer": fixed_answer(loaded).contiguous()}, answer)
