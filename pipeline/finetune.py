"""Finetuning: train LoRA factors through the packed weights of a compressed checkpoint (QLoRA, LQ-LoRA).

The packed weights stay packed: each is dequantized for one product, forward and again backward. So it takes the memory
of the checkpoint, of one dense matrix, of the factors with their gradients, and of the activations, which are computed
twice where they do not fit (gradient checkpointing). The optimizer's masters and moments are in the CPU's memory, also
where the network is on a GPU. lora_network.py says where the factors begin.

    OUT.partial/recipe.json               what is being done
    OUT.partial/training.safetensors      training_state.py, until it is done
    OUT/adapter_config.json  adapter_model.safetensors      PEFT's; binding.json has their hashes and the base's
    OUT/recipe.json                       all that decided the result
    OUT/finetune.json  report/  README.md     what it did: finetune_report.py
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pipeline.adapter import check_adapter
from pipeline.atomic import replace_file, write_json
from pipeline.conversations import Examples, read_examples
from pipeline.disk_space import disk_may_fill_up
from pipeline.errors import CalibrationError, CheckpointError, NonFiniteError
from pipeline.finetune_report import FinetuneReport, write_finetune_report
from pipeline.finetune_settings import FinetuneSettings
from pipeline.lora_network import Opened, open_for_finetuning
from pipeline.memory import give_back
from pipeline.output import OutputFolder
from pipeline.packed import load_packed, load_tokenizer
from pipeline.progress import SILENT, Progress
from pipeline.structure import num_positions
from pipeline.task import NextToken, task_of
from pipeline.trainable import save_memory
from pipeline.training import Lesson, Training, can_keep_activations, sha256_of
from pipeline.training_state import TrainingState
from quantizers.adapter import (
    BASE_FIELD,
    BINDING_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    base_sha256,
    binding,
    lora_config,
)

STATE_FILE = "training.safetensors"
REPORT_FILE = "finetune.json"
BYTES_A_NUMBER = 2 * 16 + 8  # two saves of value, moments and best value, and the adapter with twice the rank


@dataclass(frozen=True)
class Finetuned:
    """A finished adapter.

    Attributes:
        was_finished: it was there before; nothing was done anew.
    """

    folder: Path
    report: FinetuneReport
    was_finished: bool


def finetune(
    checkpoint: Path,
    dataset: str | None,
    settings: FinetuneSettings,
    output: Path,
    *,
    dataset_revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    resume: bool = True,
    progress: Progress = SILENT,
    on_start: Callable[[Examples, int], None] = lambda examples, num_trained: None,
) -> Finetuned:
    """Train an adapter on instruction data and leave it in `output`, whole or not at all.

    The values of the best measurement on the held-out examples are kept, or those of the last where none was better
    than the start. A call that was killed goes on from its last save and ends with the same bytes.

    Args:
        checkpoint: a folder that `compress` wrote.
        dataset: see conversations.py; None for the bundled instructions.
        trust_remote_code: run the code that the original brings; see pipeline/own_code.py.
        on_start: called before the first step with the examples and the number of trained parameters.
    Raises:
        CalibrationError: the dataset cannot be used.
        CheckpointError: the checkpoint is damaged, or of a model that does not go on from a text.
        DiskSpaceError: the disk is full.
        NonFiniteError: a loss is NaN or infinite; the best adapter before that, or the last where none was better
            than the start, is in `output` all the same, unless it was the first loss.
        OutputExistsError, RecipeChangedError: `output` or its unfinished work is of something else.
        RecipeError: nothing would be trained.
    """
    load = partial(load_packed, checkpoint, device, trust_remote_code=trust_remote_code)
    network = load(dtype=torch.float32 if settings.compute == "float32" else None)
    if network.dtype == torch.float16:  # which would lose small gradients
        network = load(dtype=torch.float32)
    if not isinstance(task_of(network.config), NextToken):
        raise CheckpointError(
            f"The model in {checkpoint} is no decoder that goes on from a text, and finetuning trains such models only."
        )
    examples = read_examples(
        dataset,
        load_tokenizer(checkpoint, trust_remote_code=trust_remote_code),
        seq_len=settings.seq_len,
        most_rows=settings.most_rows,
        revision=dataset_revision,
        progress=progress,
    )
    _check_fits(examples, network)
    base = base_sha256(network)
    out = OutputFolder(output, _recipe(examples, settings, base))
    out.check_claim(resume=resume)
    if out.is_finished():
        return _finished(output)
    opened = open_for_finetuning(network, settings, keep_activations=_can_keep(network, examples, settings))
    out.claim(resume=resume)
    num_trained = sum(parameter.numel() for parameter in opened.live.values())
    on_start(examples, num_trained)
    with disk_may_fill_up(output.parent, BYTES_A_NUMBER * num_trained):
        started_with = out.recipe | {"start_sha256": sha256_of(opened.live)}
        state = TrainingState.begin(out.partial / STATE_FILE, started_with, dict(opened.live), torch.device("cpu"))
        failure = train(opened.network, opened.live, examples, settings, state, progress)
        if failure and not state.best and not 0 < state.step == state.checks[-1].step:
            shutil.rmtree(out.partial)
            raise NonFiniteError(f"{failure} No adapter was written, for there was no step before that.") from failure
        report = FinetuneReport.of(
            state, settings, examples, base=checkpoint.resolve().name, num_trained=num_trained, stopped_by=failure
        )
        tokens, logits = _write(opened, state.best or state.master, examples, report, out)
        del network, opened  # or there would be two models in memory
        gc.collect()
        give_back()
        check_adapter(checkpoint, out.partial / "checkpoint", tokens, logits, trust_remote_code=trust_remote_code)
        out.finish()
    return _finished(output, was_finished=False)


def _finished(output: Path, *, was_finished: bool = True) -> Finetuned:
    report = FinetuneReport.from_json(json.loads((output / REPORT_FILE).read_text(encoding="utf-8")))
    if report.stopped_by:
        which = "the best before that" if report.has_gained else "the last before that and no better than the start"
        raise NonFiniteError(
            f"{report.stopped_by} The adapter of step {report.kept_step}, {which}, is in {output}; to train with other "
            "settings, choose another folder with -o."
        )
    return Finetuned(output, report, was_finished)


@dataclass(frozen=True)
class Answers(Lesson):
    """Say the answers, token by token."""

    title: ClassVar[str] = "Finetuning"
    item: ClassVar[str] = "example"
    network: PeftModel
    examples: Examples
    settings: FinetuneSettings

    def __len__(self) -> int:
        return len(self.examples)

    def losses(self, indices: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        """All at once, since each pass dequantizes every weight: the mean over all tokens of all answers."""
        logits, targets = self._predicted(indices)
        yield indices, nn.functional.cross_entropy(logits.float(), targets)

    def held_out_loss(self, indices: range) -> float:
        """The same."""
        total, num_tokens = 0.0, 0
        for start in range(0, len(indices), self.settings.batch_size):
            logits, targets = self._predicted(list(indices[start : start + self.settings.batch_size]))
            total += nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item()
            num_tokens += len(targets)
        return total / num_tokens

    def save_memory(self) -> bool:
        """See pipeline/trainable.py."""
        base = self.network.get_base_model()
        assert isinstance(base, PreTrainedModel)
        return save_memory(base)

    def _predicted(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Logits [answers, vocab] for the answers' tokens, and those tokens [answers]."""
        device, items = self.network.device, [self.examples.items[index] for index in indices]
        tokens = pad_sequence([item.tokens for item in items], batch_first=True).to(device)
        is_answer = pad_sequence([item.is_answer for item in items], batch_first=True).to(device)
        is_there = pad_sequence([torch.ones_like(item.tokens) for item in items], batch_first=True).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.compute == "bfloat16"):
            logits = self.network(input_ids=tokens, attention_mask=is_there, use_cache=False).logits
        return logits[:, :-1][is_answer[:, 1:]], tokens[is_answer]


def train(
    network: PeftModel,
    live: dict[str, nn.Parameter],
    examples: Examples,
    settings: FinetuneSettings,
    state: TrainingState,
    progress: Progress,
) -> NonFiniteError | None:
    """Bring the state to its end, or to where a loss was not finite: then the error, the last good step measured."""
    training = Training(
        live,
        Answers(network, examples, settings),
        settings,
        state,
        batch_size=settings.batch_size,
        patience=None,
        as_stored=lambda values: values,
        what_else="",
    )
    try:
        training.run(progress)
    except NonFiniteError as error:
        training.check_last()
        return error
    return None


def _write(
    opened: Opened, values: dict[str, Tensor], examples: Examples, report: FinetuneReport, out: OutputFolder
) -> tuple[Tensor, Tensor]:
    """Write the adapter where it is audited; what the trained network says to the last example: tokens, logits."""
    staged = out.partial / "checkpoint"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    tensors = opened.adapter(values)
    replace_file(staged / WEIGHTS_FILE, partial(save_file, tensors, metadata={"format": "pt"}))
    _write_config(opened, report.base, staged)
    write_json(staged / BINDING_FILE, binding(staged, out.recipe[BASE_FIELD], opened.network.config))
    write_json(staged / "recipe.json", out.recipe)
    write_json(staged / REPORT_FILE, report.to_json())
    write_finetune_report(report, out.recipe, staged)
    tokens = examples.items[-1].tokens
    with torch.no_grad():
        for name, value in values.items():
            opened.live[name].copy_(value)
        found = opened.network(input_ids=tokens[None].to(opened.network.device), use_cache=False)
    return tokens, found.logits[0]


def _write_config(opened: Opened, base: str, folder: Path) -> None:
    """PEFT's, in an order of its own: PEFT writes the names of modules as a set gives them."""
    config = lora_config(opened.stored_ranks)
    config.inference_mode = True
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    write_json(folder / CONFIG_FILE, content | {"target_modules": sorted(content["target_modules"])})


def _can_keep(network: PreTrainedModel, examples: Examples, settings: FinetuneSettings) -> bool:
    longest = max(len(item.tokens) for item in examples.items)
    return can_keep_activations(network, longest * settings.batch_size)


def _check_fits(examples: Examples, network: PreTrainedModel) -> None:
    longest, positions = max(len(item.tokens) for item in examples.items), num_positions(network)
    if positions is not None and longest > positions:
        raise CalibrationError(
            f"An example of {longest} tokens is longer than the {positions} positions that this model knows. Give "
            f"--seq-len {positions} or less: longer examples are left out."
        )
    largest, vocab_size = (
        max(int(item.tokens.max()) for item in examples.items),
        network.config.get_text_config().vocab_size,
    )
    if largest >= vocab_size:
        raise CalibrationError(
            f"Token id {largest} from {examples.source} is beyond the model's vocabulary of {vocab_size}: the "
            "tokenizer in the checkpoint does not belong to this model."
        )


def _recipe(examples: Examples, settings: FinetuneSettings, base: str) -> dict[str, Any]:
    return settings.model_dump(mode="json") | {
        "bitsmith": version("bitsmith"),
        BASE_FIELD: base,
        "dataset": examples.source,
        "dataset_commit": examples.revision,
        "dataset_sha256": examples.sha256,
    }
