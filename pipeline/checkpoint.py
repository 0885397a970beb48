"""The finished folder: what is in it, how large it will be to the byte, and how it is written.

    config.json                       the original's, with `quantization_config` (docs/checkpoint-format.md)
    model.safetensors                 or model-0000i-of-0000N.safetensors with model.safetensors.index.json
    tokenizer files, chat template, generation_config.json, licence   as in the original
    plan.json                         what every matrix got, how good that provably is, and why the others got nothing
    recipe.json                       everything that decided the result

Planning and writing share one description, so the forecast is exact and not an estimate.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pipeline.allocation import Plan
from pipeline.atomic import replace_file
from pipeline.decompose import read_matrix
from pipeline.model import Model
from pipeline.origin import hub_id
from pipeline.own_code import REFERRING_FILES, referring_to
from pipeline.progress import SILENT, Progress
from pipeline.safetensors_file import DTYPES, SafetensorsFile, TensorSpec, into_shards
from quantizers import quantization_config

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Checkpoint:
    """The folder that a plan makes of a model.

    Attributes:
        recipe: plain JSON, written as recipe.json.
    """

    model: Model
    plan: Plan
    recipe: dict[str, Any]

    @cached_property
    def shards(self) -> dict[str, SafetensorsFile]:
        """File name -> layout, in the original's order of tensors."""
        files = into_shards(self._specs(), SHARD_BYTES)
        if len(files) == 1:
            return {"model.safetensors": files[0]}
        return {f"model-{i:05d}-of-{len(files):05d}.safetensors": file for i, file in enumerate(files, 1)}

    @cached_property
    def texts(self) -> dict[str, str]:
        """File name -> content of the JSON files that are made here."""
        config = self._referring("config.json")
        config.pop("_name_or_path", None)  # where whoever saved it had loaded it from; nobody reads it
        if self.model.config.architectures:  # of what is in the files, see settle_architecture
            config["architectures"] = self.model.config.architectures
        if not (config.get("dtype") or config.get("torch_dtype")):  # else that of our first tensor would stand for it
            config["dtype"] = str(self._first_dtype).removeprefix("torch.")
        config["quantization_config"] = quantization_config(
            {module: (matrix.format, matrix.shape) for module, matrix in self.plan.packed.items()},
            [each.module for each in self.model.embeddings if each.is_head and each.module in self.plan.embeddings],
        )
        texts = {"config.json": config, "plan.json": self._plan(), "recipe.json": self.recipe}
        texts |= dict(self._rewritten())
        if len(self.shards) > 1:
            weight_map = {spec.name: name for name, file in self.shards.items() for spec in file.tensors}
            total = sum(spec.size_bytes for file in self.shards.values() for spec in file.tensors)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            texts["model.safetensors.index.json"] = index
        return {
            name: json.dumps(text, indent=2, sort_keys=True, ensure_ascii=False) + "\n" for name, text in texts.items()
        }

    @property
    def sizes_bytes(self) -> dict[str, int]:
        """File name -> exact size of every file of the folder."""
        sizes = {name: file.size_bytes for name, file in self.shards.items()}
        sizes |= {name: len(text.encode()) for name, text in self.texts.items()}
        return sizes | {name: (self.model.path / name).stat().st_size for name in self._copied()}

    @property
    def size_bytes(self) -> int:
        """Exact size of the whole folder."""
        return sum(self.sizes_bytes.values())

    def write(
        self,
        folder: Path,
        matrix_path: Callable[[str], Path],
        kept: Mapping[str, Tensor] = MappingProxyType({}),
        *,
        progress: Progress = SILENT,
    ) -> None:
        """Write every file into `folder`; weights that a killed call of this checkpoint left there are whole, and stay.

        Args:
            matrix_path: module name -> file that `decompose` wrote for it.
            kept: parameter name -> tensor in place of the original's, of its shape and dtype.
        """
        for name in self._copied():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(folder / name, partial(shutil.copyfile, self.model.path / name))
        for name, text in self.texts.items():
            replace_file(folder / name, partial(_write_text, text))
        reader = _Reader(self.model, self.plan, matrix_path, kept)
        missing = {name: file for name, file in self.shards.items() if not (folder / name).exists()}
        num_done = len(self.shards) - len(missing)
        for name, file in progress.track(missing.items(), "Write checkpoint", len(self.shards), num_done):
            replace_file(folder / name, partial(file.write, read=reader.tensor))

    def _copied(self) -> list[str]:
        return [name for name in self.model.extra_files() if name not in self.texts]

    @property
    def _first_dtype(self) -> torch.dtype:
        """What transformers takes for the original's where its config names none."""
        found = (DTYPES[info.dtype] for info in self.model.tensors.values())
        return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)

    @property
    def _code_repo(self) -> str | None:
        """The Hub's repository with the code that the model brings, if that is run."""
        is_there = self.model.trust_remote_code and self.model.revision is not None
        return hub_id(self.model.spec, self.model.revision) if is_there else None

    def _rewritten(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in self.model.extra_files():
            if name in REFERRING_FILES:
                before, now = self._read(name), self._referring(name)
                if now != before:
                    yield name, now

    def _referring(self, name: str) -> dict[str, Any]:
        """A JSON file of the original, with its classes where a checkpoint finds them (own_code.py)."""
        content = self._read(name)
        if not self.model.trust_remote_code:
            content.pop("auto_map", None)  # it was not used, and names files that are not copied
        return referring_to(self._code_repo, content)

    def _plan(self) -> dict[str, Any]:
        """The plan, and why each of the other weights stays as it is."""
        packed = {f"{module}.weight" for module in self.plan.packed}
        return self.plan.to_json() | {
            "skipped": {each.name: each.reason for each in self.model.skipped if each.name not in packed}
        }

    def _read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.model.path / name).read_text(encoding="utf-8"))
        return content

    def _specs(self) -> list[TensorSpec]:
        specs = []
        for name, info in self.model.tensors.items():
            planned = self.plan.packed.get(name.removesuffix(".weight"))
            if planned is None:
                specs.append(TensorSpec(info.name, DTYPES[info.dtype], info.shape))
                continue
            stored_module = info.name.removesuffix("weight")
            specs += [
                TensorSpec(stored_module + key, dtype, shape)
                for key, (shape, dtype) in planned.format.tensor_specs(planned.shape).items()
            ]
        return specs


def _write_text(text: str, target: Path) -> None:
    target.write_text(text, encoding="utf-8")


class _Reader:
    """Gives each tensor of the checkpoint by its stored name; the matrix read last is kept."""

    def __init__(
        self, model: Model, plan: Plan, matrix_path: Callable[[str], Path], kept: Mapping[str, Tensor]
    ) -> None:
        self._model, self._plan, self._matrix_path, self._kept = model, plan, matrix_path, kept
        self._parameter_of = {info.name: name for name, info in model.tensors.items()}
        self._module_of = {
            model.tensors[f"{module}.weight"].name.removesuffix(".weight"): module for module in plan.packed
        }
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def tensor(self, name: str) -> Tensor:
        stored_module, _, key = name.rpartition(".")
        module = self._module_of.get(stored_module)
        if module is None or name in self._parameter_of:
            parameter = self._parameter_of[name]
            return self._kept[parameter] if parameter in self._kept else self._model.tensor(parameter)
        if self._last[0] != module:
            self._last = (module, read_matrix(self._matrix_path(module), self._plan, module).tensors())
        return self._last[1][key]
