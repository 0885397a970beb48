"""What a peer leaves behind: one safetensors file with dequantized weights and, in its header, the facts.

    NAME.weight    [out, in], in the dtype that the peer dequantizes to, named as in the model folder
    "facts"        in the metadata: JSON with peer, bits, group, size_bits, stored_bits, seconds and so on (see job.py)

Needs torch and safetensors only: peers run in environments of their own.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Facts = dict[str, Any]


def save_weights(path: Path, weights: Mapping[str, Tensor], facts: Facts) -> None:
    """Write the file; it gets its name only when it is complete."""
    unfinished = path.with_name(path.name + ".unfinished")
    metadata = {"facts": json.dumps(facts, sort_keys=True)}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, unfinished, metadata=metadata)
    unfinished.replace(path)


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], Facts]:
    """Read a peer's dequantized weights.

    Returns:
        Name in the model folder -> weight [out, in] on the CPU, in the dtype that the peer computes in; and the facts.
    Raises:
        ValueError: the file was not written by `save_weights`.
    """
    facts = load_facts(path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118, not a dict


def load_facts(path: Path | str) -> Facts:
    """Only the facts of `load_weights`: reads the header, not the weights."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "facts" not in metadata:
        raise ValueError(
            f"{path} has no facts in its header, so it is not a peer's result. "
            "Point to a file that benchmarks.peers.run wrote, or run the peer again."
        )
    return json.loads(metadata["facts"])


def inputs_digest(model: Path, tokens: Path) -> str:
    """SHA-256 over the model's safetensors files (in the order of their names) and the calibration tokens."""
    digest = hashlib.sha256()
    for path in [*sorted(model.glob("*.safetensors")), tokens]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
