"""Does a stored version hold what its plan says? From the headers of its files, without reading a weight."""

import json

from pipeline.errors import CheckpointError
from pipeline.safetensors_file import DTYPES
from pipeline.shards import TensorInfo, read_header
from quantizers.transformers_plugin import BitsmithConfig
from registry import Registry, Version


def check_planned(registry: Registry, version: Version) -> int:
    """Compare every compressed matrix with plan.json: choice, tensors, shapes, dtypes and bits.

    Returns:
        the number of matrices.
    Raises:
        CheckpointError: names the first matrix that differs.
        RegistryError: a file is missing.
    """
    checkpoint = registry.get(version.digest)
    plan, config = (json.loads(registry.path(checkpoint, name).read_text()) for name in ("plan.json", "config.json"))
    try:
        formats = BitsmithConfig(**config["quantization_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{version}: config.json does not describe packed matrices ({error}).") from error
    stored: dict[str, TensorInfo] = {}
    for name in checkpoint.files:
        if name.endswith(".safetensors"):
            stored |= {info.name: info for info in read_header(registry.path(checkpoint, name))}
    if set(plan["matrices"]) != set(formats.matrices):
        different = sorted(set(plan["matrices"]) ^ set(formats.matrices))
        raise CheckpointError(f"{version}: plan.json and config.json disagree about {', '.join(different[:3])}.")
    for module, planned in plan["matrices"].items():
        form, shape = formats.format_of(module)
        if (form.label, list(shape)) != (planned["label"], planned["shape"]):
            raise CheckpointError(
                f"{version}: {module} was planned as {planned['label']} {planned['shape']}, and config.json says "
                f"{form.label} {list(shape)}."
            )
        size_bits = 0
        for suffix, (tensor_shape, dtype) in form.tensor_specs(shape).items():
            found = stored.get(f"{module}.{suffix}")
            expected = f"{list(tensor_shape)} {str(dtype).removeprefix('torch.')}"
            if found is None or (found.shape, DTYPES.get(found.dtype)) != (tensor_shape, dtype):
                got = f"{list(found.shape)} {found.dtype}" if found else "nothing"
                raise CheckpointError(f"{version}: {module}.{suffix} should be {expected}, and the files hold {got}.")
            size_bits += 8 * found.size_bytes
        if size_bits != planned["size_bits"]:
            raise CheckpointError(
                f"{version}: {module} was planned with {planned['size_bits']} bits, and {size_bits} are stored."
            )
    return len(plan["matrices"])
