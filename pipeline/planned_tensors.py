"""Does a stored version hold what its plan says? From the headers of its files, without reading a weight."""

from typing import Any

from pipeline.errors import CheckpointError
from pipeline.safetensors_file import DTYPES
from pipeline.shards import TensorInfo, read_header
from pipeline.version_documents import read_document, read_plan, reading
from quantizers.transformers_plugin import BitsmithConfig
from registry import Artifact, Registry, Version


def check_planned(registry: Registry, version: Version) -> int | None:
    """Compare every compressed matrix with plan.json: choice, tensors, shapes, dtypes and bits.

    Returns:
        the number of matrices; None where there is no plan, and a version of its kind need not have one.
    Raises:
        CheckpointError: names the first matrix that differs; or it is a checkpoint without a plan, or the plan or the
            configuration is not as bitsmith writes it.
        RegistryError: a file is missing.
    """
    checkpoint = registry.get(version.digest)
    for name in ("plan.json", "config.json"):
        if name not in checkpoint.files:
            if checkpoint.kind != "checkpoint":
                return None
            raise CheckpointError(
                f"{version}: every hash holds, but there is no {name} to compare its tensors with, and a checkpoint "
                "has one. Another program made it. Choose a version that `bitsmith compress` made."
            )
    plan = read_plan(registry.path(checkpoint, "plan.json"), f"plan.json of {version}")
    config = read_document(registry.path(checkpoint, "config.json"), f"config.json of {version}")
    try:
        formats = BitsmithConfig(**config["quantization_config"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{version}: config.json does not describe packed matrices ({error}).") from error
    with reading(f"plan.json or config.json of {version}"):
        return _check_tensors(registry, version, checkpoint, plan, formats)


def _check_tensors(
    registry: Registry, version: Version, checkpoint: Artifact, plan: dict[str, Any], formats: BitsmithConfig
) -> int:
    stored: dict[str, TensorInfo] = {}
    for name in checkpoint.files:
        if name.endswith(".safetensors"):
            stored |= {info.name: info for info in read_header(registry.path(checkpoint, name))}
    packed = plan["matrices"] | plan["embeddings"]
    if set(packed) != set(formats.matrices):
        different = sorted(set(packed) ^ set(formats.matrices))
        raise CheckpointError(f"{version}: plan.json and config.json disagree about {', '.join(different[:3])}.")
    for module, planned in packed.items():
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
    return len(packed)
