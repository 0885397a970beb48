"""Finetuning: train LoRA factors through the packed weights of a compressed checkpoint (QLoRA, LQ-LoRA).

The packed weights stay packed: each is dequantized for one product, forward and again backward. So it takes the memory
of the checkpoint, of one dense matrix, of the factors with their gradients, and of the activations, which are computed
twice where they do not fit (gradient checkpointing). The optimizer's masters and moments are in the CPU's memory, also
where the network is on a GPU.

`start` says where the factors begin:

    zero       new ones on every packed layer, B = 0 (LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314)
    factors    the checkpoint's own L1 and L2 where it has a low-rank part (LQ-LoRA, arXiv:2311.12023), else new ones

Either way the result is an addition to the checkpoint as it is. Trained L1' and L2' become B = [L1' -L1] and
A = [L2'; L2], twice the rank, so that every reader of LoRA factors reads them right.

    OUT.partial/recipe.json               what is being done
    OUT.partial/training.safetensors      training_state.py, until it is done
    OUT/adapter_config.json  adapter_model.safetensors      PEFT's; binding.json has their hashes and the base's
    OUT/recipe.json                       all that decided the result
    OUT/finetune.json  report/  README.md     what it did: finetune_report.py
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel

from pipeline.adapter import check_adapter
from pipeline.atomic import replace_file, write_json
from pipeline.conversations import Examples, read_examples
from pipeline.disk_space import disk_may_fill_up
from pipeline.errors import CalibrationError, CheckpointError, NonFiniteError, RecipeError
from pipeline.finetune_report import FinetuneReport, write_finetune_report
from pipeline.finetune_settings import FinetuneSettings
from pipeline.output import OutputFolder
from pipeline.packed import load_packed
from pipeline.progress import SILENT, Progress
from pipeline.quiet import quiet_transformers
from pipeline.structure import num_positions
from pipeline.task import NextToken, task_of
from pipeline.trainable import checkpoint_activations
from pipeline.training import Lesson, Training, can_keep_activations, sha256_of
from pipeline.training_state import TrainingState
from quantizers import QuantizedLinear
from quantizers.adapter import (
    BASE_FIELD,
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoraQuantizedLinear,
    base_sha256,
    bind,
    lora_config,
    quiet_peft,
)
from solvers.low_rank import Factors

STATE_FILE = "training.safetensors"
REPORT_FILE = "finetune.json"
PEFT_PREFIX = "base_model.model."


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
        on_start: called before the first step with the examples and the number of trained parameters.
    Raises:
        CalibrationError: the dataset cannot be used.
        CheckpointError: the checkpoint is damaged, or of a model that does not go on from a text.
        DiskSpaceError: the disk is full.
        NonFiniteError: a loss is NaN or infinite; where a measurement before that was better than the start, the
            adapter of that step is in `output` all the same.
        OutputExistsError, RecipeChangedError: `output` or its unfinished work is of something else.
        RecipeError: nothing would be trained.
    """
    network = load_packed(checkpoint, device, torch.float32 if settings.compute == "float32" else None)
    if network.dtype == torch.float16:  # which would lose small gradients
        network = load_packed(checkpoint, device, torch.float32)
    if not isinstance(task_of(network.config), NextToken):
        raise CheckpointError(
            f"The model in {checkpoint} is no decoder that goes on from a text, and finetuning trains such models only."
        )
    examples = _read(checkpoint, dataset, dataset_revision, settings, network, progress)
    base = base_sha256(network)
    out = OutputFolder(output, _recipe(examples, settings, base))
    out.check_claim(resume=resume)
    if out.is_finished():
        return _finished(output)
    opened = open_for_finetuning(network, settings, keep_activations=_can_keep(network, examples, settings))
    out.claim(resume=resume)
    num_trained = sum(parameter.numel() for parameter in opened.live.values())
    on_start(examples, num_trained)
    with disk_may_fill_up(output.parent, 3 * 16 * num_trained):
        started_with = out.recipe | {"start_sha256": sha256_of(opened.live)}
        state = TrainingState.begin(out.partial / STATE_FILE, started_with, dict(opened.live), torch.device("cpu"))
        failure = train(opened.network, opened.live, examples, settings, state, progress)
        if failure and not state.best:
            shutil.rmtree(out.partial)
            raise NonFiniteError(
                f"{failure} No adapter was written: the loss on the held-out examples was not below that of the start."
            ) from failure
        report = FinetuneReport.of(
            state, settings, examples, base=checkpoint.resolve().name, num_trained=num_trained, stopped_by=failure
        )
        tokens, logits = _write(opened, state.best or state.master, examples, report, out)
        del network, opened  # or there would be two models in memory
        check_adapter(checkpoint, out.partial / "checkpoint", tokens, logits)
        out.finish()
    return _finished(output, was_finished=False)


def _finished(output: Path, *, was_finished: bool = True) -> Finetuned:
    report = FinetuneReport.from_json(json.loads((output / REPORT_FILE).read_text(encoding="utf-8")))
    if report.stopped_by:
        raise NonFiniteError(
            f"{report.stopped_by} The adapter of step {report.kept_step}, the best before that, is in {output}; to "
            "train with other settings, choose another folder with -o."
        )
    return Finetuned(output, report, was_finished)


def _read(
    checkpoint: Path,
    dataset: str | None,
    revision: str | None,
    settings: FinetuneSettings,
    network: PreTrainedModel,
    progress: Progress,
) -> Examples:
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    examples = read_examples(
        dataset,
        tokenizer,
        seq_len=settings.seq_len,
        most_rows=settings.most_rows,
        revision=revision,
        progress=progress,
    )
    _check_fits(examples, network)
    return examples


@dataclass(frozen=True)
class Opened:
    """A packed network with trainable factors on its layers.

    Attributes:
        live: the parameters to train, by name.
        replaced: module -> the checkpoint's own factors, where trained ones stand in for them.
    """

    network: PeftModel
    live: dict[str, nn.Parameter]
    replaced: dict[str, Factors]

    @property
    def stored_ranks(self) -> dict[str, int]:
        """Module -> rank of `adapter`."""
        ranks = {_module(name): layer.r["default"] for name, layer in _lora_layers(self.network).items()}
        return {name: rank * (1 + (name in self.replaced)) for name, rank in ranks.items()}

    def adapter(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trained factors as PEFT stores them, an addition to the whole checkpoint; on the CPU, float32."""
        found: dict[str, Tensor] = {}
        for name in _lora_layers(self.network):
            into, out = (values[f"{name}.{kind}.default.weight"].cpu() for kind in ("lora_A", "lora_B"))
            if (own := self.replaced.get(_module(name))) is not None:
                into = torch.cat([into, own.into.cpu()])
                out = torch.cat([out, -own.out.cpu()], dim=1)
            found |= {f"{name}.lora_A.weight": into.contiguous(), f"{name}.lora_B.weight": out.contiguous()}
        return found


def open_for_finetuning(
    network: PreTrainedModel, settings: FinetuneSettings, *, keep_activations: bool = False
) -> Opened:
    """`network`, changed in place, with all but the trained factors frozen.

    Args:
        keep_activations: instead of computing each block's again in the backward pass.
    Raises:
        RecipeError: nothing would be trained.
    """
    packed = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLinear)}
    replaced: dict[str, Factors] = {}
    for name, layer in packed.items():
        quantized = layer.quantized()
        if settings.start == "factors" and quantized.low_rank is not None:
            replaced[name] = quantized.low_rank.factors()
            plain = QuantizedLinear.from_quantized(quantized.without_low_rank(), layer.bias)
            network.set_submodule(name, plain)
    ranks = {name: replaced[name].out.shape[1] if name in replaced else settings.rank for name in packed}
    ranks = {name: rank for name, rank in ranks.items() if rank}
    if not ranks:
        raise RecipeError(
            f"Nothing would be trained: the rank is 0, and none of the {len(packed)} packed layers has factors of its "
            "own to start from. Give --rank 1 or more, for example 16."
        )
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        with quiet_peft():
            tuned = get_peft_model(network, lora_config(ranks))
    assert isinstance(tuned, PeftModel)
    live = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, own in replaced.items():
            live[f"{PEFT_PREFIX}{name}.lora_A.default.weight"].copy_(own.into)
            live[f"{PEFT_PREFIX}{name}.lora_B.default.weight"].copy_(own.out)
    if keep_activations:
        network.eval()
    else:
        checkpoint_activations(network)
    return Opened(tuned, live, replaced)


def _module(name: str) -> str:
    """The name in the checkpoint of what PEFT calls `name`."""
    return name.removeprefix(PEFT_PREFIX)


def _lora_layers(network: PeftModel) -> dict[str, LoraQuantizedLinear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraQuantizedLinear)}


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
    bind(staged, out.recipe[BASE_FIELD])
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
