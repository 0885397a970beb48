"""What each stage of a run will take, before it runs: memory, time and disk, from headers and the recipe alone.

Memory is what is held at once, term by term. Time (stage_seconds.py) is only about right. Disk is in disk_space.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import psutil
import torch

from pipeline.allocation import PlannedEmbedding, free_to_choose
from pipeline.base_logits import LIMIT_BYTES, SLICE_TOKENS, cache_bytes
from pipeline.curvature_sums import sums_of
from pipeline.disk_space import stage_disk_bytes
from pipeline.embedding_costs import MOST_WINDOWS
from pipeline.embedding_steps import has_embedding_costs, weighs_head
from pipeline.embeddings import packable, packing_bytes
from pipeline.evaluate import batch_of
from pipeline.layered_pass import loss_bytes
from pipeline.memory import free_bytes, give_back
from pipeline.model_memory import FLOAT32_BYTES, ModelMemory, model_memory
from pipeline.parallel import num_cores
from pipeline.run import Run
from pipeline.spread import is_in_processes, num_workers
from pipeline.spread_gpus import SLOT_BYTES, gpus_of, num_slots
from pipeline.stage_seconds import StageSeconds
from pipeline.statistics import most_windows_at_once
from pipeline.summed_parts import PART_WINDOWS, sum_bytes
from pipeline.tail import tail_room, tail_within
from pipeline.training import FREE_SHARE, KEPT_A_FEATURE
from pipeline.unloaded import is_whole
from pipeline.working_memory import LOOPS_BYTES, PROCESS_BYTES, costs_bytes, quantize_bytes
from quantizers import quantizer_from_label
from quantizers.compiled import loads_for

HEAP_BYTES = 100 * 2**20  # in pieces that the allocator keeps, while a network runs
LATER_BYTES = 70 * 2**20  # libraries that are loaded on the way: solvers, scipy
PROGRAM_BYTES = 20 * 2**20  # the integer program
REPORT_BYTES = 120 * 2**20  # matplotlib, and the pictures
DEQUANTIZE_BYTES = 24  # for each weight of the layer under way
SLICE_BYTES = 48  # for each probability that is scored at once, in float64
COMPARED_ANSWERS = 4  # of a window's size in float32, while the divergence of one from another is taken
LOG_PROB_BYTES = 10  # for each probability: float16, while it is written with its checksum or read and checked


@dataclass(frozen=True)
class StageForecast:
    """What one stage will take.

    Attributes:
        seconds: about.
        memory_bytes: of the machine's memory, by the process that takes most, as in `Stage`.
        total_bytes: by all processes together.
        device_bytes: of a GPU's memory, of the first one's where matrices are spread over several.
        disk_bytes: written at most, in the registry and beside it.
    """

    name: str
    seconds: float
    memory_bytes: int
    total_bytes: int
    device_bytes: int = 0
    disk_bytes: int = 0


def forecast(run: Run) -> tuple[StageForecast, ...]:
    """Of the stages to come, in their order; without those whose results are in the registry."""
    give_back()
    facts = _Facts(run, model_memory(run.model), psutil.Process().memory_info().rss)
    stages: list[StageForecast] = []
    if run.texts.calibration is not None and not (run.resume and run.has_statistics()):
        stages.append(facts.statistics())
    if not (run.resume and run.has_costs()):
        stages.append(facts.costs())
    if free_to_choose(run.embeddings) and not (run.resume and has_embedding_costs(run)):
        stages.append(facts.embeddings())
    facts = replace(facts, now=facts.now + LATER_BYTES)
    stages += [facts.plan(), facts.decompose()]
    if run.texts.recovery is not None:
        stages.append(facts.recover())
    stages.append(facts.checkpoint())
    if run.texts.evaluation is not None:
        stages.append(facts.evaluate())
    stages.append(facts.report())
    written = stage_disk_bytes(run)
    return tuple(replace(stage, disk_bytes=written[stage.name]) for stage in stages)


@dataclass(frozen=True)
class _Facts:
    """Of a run, with what the process holds already, in bytes."""

    run: Run
    memory: ModelMemory
    now: int

    @property
    def seconds(self) -> StageSeconds:
        return StageSeconds(self.run)

    @property
    def device(self) -> torch.device:
        return torch.device(self.run.device)

    @property
    def free(self) -> int:
        return free_bytes(torch.device("cpu")) - LATER_BYTES

    @property
    def answer_width(self) -> int:
        return self.run.model.task.answer_width(self.run.model.config)

    @property
    def metric(self):
        return None if self.run.recipe.sensitivity == "none" else self.run.recipe.sensitivity

    def around_packed(self, embeddings: Mapping[str, PlannedEmbedding]) -> int:
        """Float32 of all that is not compressed, and packed embeddings."""
        model, packed = self.run.model, packable(tuple(embeddings.values()))
        dense = model.num_params - model.num_matrix_params - sum(math.prod(each.shape) for each in packed)
        return FLOAT32_BYTES * dense + sum(each.size_bits // 8 for each in packed)

    @property
    def packed(self) -> int:
        """A packed model, and the layer that is dequantized."""
        sizes, largest = self.run.sizes, max(matrix.num_params for matrix in self.run.model.matrices)
        packed = max(sizes.compressed_bytes_beside(each) + self.around_packed(each) for each in sizes.embedding_sets)
        return HEAP_BYTES + self.loops + packed + DEQUANTIZE_BYTES * largest

    @property
    def loops(self) -> int:
        """What a process takes for good that decodes a matrix of each kind on offer."""
        largest = max(matrix.num_params for matrix in self.run.model.matrices)
        kinds = {quantizer_from_label(label).format.kind for label in self.run.labels}
        return LOOPS_BYTES if any(loads_for(kind, largest) for kind in kinds) else 0

    def statistics(self) -> StageForecast:
        """layered_pass.py with part_sums.py; then summed_parts.py; then curvature_scale.py."""
        run, memory = self.run, self.memory
        assert run.texts.calibration is not None
        num_windows, seq_len = run.texts.calibration.tokens.shape
        kind = sums_of(run.recipe.sensitivity)  # type: ignore[arg-type]
        width = run.model.config.get_text_config().hidden_size
        part = FLOAT32_BYTES * most_windows_at_once(kind, num_windows) * seq_len * width
        layers = self._layers(kind)
        kept = round(memory.kept_bytes_a_token * seq_len)
        weights = memory.block_bytes or (0,)
        if kind.forms_gradients:
            kept += FLOAT32_BYTES * max(matrix.num_params for matrix in run.model.matrices)
        held = [nbytes + sums + kept for nbytes, sums in zip(weights, layers, strict=True)]
        if kind.of_input_alone:
            at_once = max(held)
            loss = loss_bytes(seq_len, self.answer_width, is_drawn=True) if kind.scaled_by_divergence else 0
        else:
            around = HEAP_BYTES + memory.around_bytes
            tail = tail_within(tail_room(max(0, free_bytes(self.device) - around)), held)
            at_once = sum(held[tail.start : tail.stop])
            loss = loss_bytes(seq_len, self.answer_width, is_drawn=kind.labels_are_drawn)
        if weighs_head(run) and not free_to_choose(run.embeddings):
            loss = max(loss, FLOAT32_BYTES * seq_len * self.answer_width)  # head_curvature.py; all else takes less
        windows = 3 * part  # read, passed, and stacked to be written
        shapes = [shape for matrix in run.model.matrices for shape in kind.shapes(matrix.shape).values()]
        before = FLOAT32_BYTES * max(map(math.prod, shapes))  # of the parts before, added a tensor at a time
        network = HEAP_BYTES + memory.around_bytes + at_once + max(windows + loss, before)
        if kind.labels_are_drawn:
            largest = max(costs_bytes(matrix.shape, self.metric) for matrix in run.model.matrices)
            network = max(network, HEAP_BYTES + memory.around_bytes + at_once + largest)
        return self._stage("statistics", self.seconds.statistics(), network, 3 * max(layers))

    def _layers(self, kind) -> list[int]:
        """Sums of each block; of all matrices where there is one block."""
        matrices = self.run.model.matrices
        if not self.memory.block_bytes:
            return [sum_bytes(matrices, kind)]
        return [
            sum_bytes([matrix for matrix in matrices if matrix.layer == layer], kind)
            for layer in range(len(self.memory.block_bytes))
        ]

    def costs(self) -> StageForecast:
        """A matrix a thread."""
        each = [costs_bytes(matrix.shape, self.metric) for matrix in self.run.model.matrices]
        if self.device.type != "cpu":
            return self._on_gpus("costs", self.seconds.costs(num_cores()), each)
        workers = num_workers(each, False, self.free)
        return self._host("costs", self.seconds.costs(workers), self.now + workers * max(each))

    def embeddings(self) -> StageForecast:
        """What the head reads (head_curvature.py), packing (embeddings.py), answers (embedding_costs.py)."""
        run, memory, free = self.run, self.memory, free_to_choose(self.run.embeddings)
        assert run.texts.calibration is not None
        num_windows, seq_len = run.texts.calibration.tokens.shape
        width, num_logits = run.model.config.get_text_config().hidden_size, seq_len * self.answer_width
        part = FLOAT32_BYTES * min(PART_WINDOWS, num_windows) * seq_len * width
        head = HEAP_BYTES + memory.around_bytes + memory.largest_block_bytes + 3 * part + FLOAT32_BYTES * num_logits
        batch = min(MOST_WINDOWS, num_windows, batch_of(seq_len, self.answer_width))
        answers = FLOAT32_BYTES * (2 * batch + COMPARED_ANSWERS) * num_logits
        table = 2 * FLOAT32_BYTES * max(math.prod(choices[0].shape) for choices in free.values())
        network = max(head, self._original(batch * seq_len) + answers + table)
        packing = packing_bytes(run.model, free, is_weighted=weighs_head(run))
        return self._stage("embeddings", self.seconds.embeddings(), network, max(packing, self._moved))

    def plan(self) -> StageForecast:
        """A small program; a rival of the plan is measured at times, as in evaluation (rival.py)."""
        return self._host("plan", self.seconds.plan(), self.now + PROGRAM_BYTES)

    def decompose(self) -> StageForecast:
        """A matrix a process, or a thread."""
        model, labels = self.run.model, self.run.labels
        shapes = {matrix.shape for matrix in model.matrices}
        each = [quantize_bytes(shape, self.metric, labels) for shape in shapes]
        in_processes = is_in_processes(True, model.matrices)
        packing = packing_bytes(model, self.run.embeddings, is_weighted=weighs_head(self.run))
        packing += self.now  # before the matrices (run.py)
        if self.device.type != "cpu":
            there = self._on_gpus("decompose", self.seconds.decompose(num_cores()), each)
            host = max(packing, there.memory_bytes)
            return replace(there, memory_bytes=host, total_bytes=host)
        workers = num_workers(each, in_processes, self.free)
        seconds = self.seconds.decompose(workers)
        if not in_processes:
            return self._host("decompose", seconds, max(packing, self.now + workers * max(each)))
        worker = PROCESS_BYTES + max(each)
        total = max(packing, self.now + workers * worker)
        return StageForecast("decompose", seconds, max(packing, worker), total)

    def recover(self) -> StageForecast:
        """The original's answers (teacher.py), then training (recover.py, trainable.py)."""
        run = self.run
        assert run.texts.recovery is not None
        seq_len = run.texts.recovery.tokens.shape[1]
        logits = FLOAT32_BYTES * seq_len * self.answer_width
        itemsize = 2 if run.recovery_settings.compute == "bfloat16" else 4
        dense = itemsize * run.model.num_matrix_params
        features = sum(sum(matrix.shape) for matrix in run.model.matrices)
        activations = FLOAT32_BYTES * KEPT_A_FEATURE * seq_len * features
        if activations >= FREE_SHARE * (free_bytes(self.device) - dense):
            activations = round(self.memory.kept_bytes_a_token * seq_len)
        training = self.packed + dense + activations + 3 * logits  # with their gradient, and a slice's probabilities
        teacher = self._original(seq_len) + logits
        return self._stage("recover", self.seconds.recover(), max(training, teacher), self._moved)

    def checkpoint(self) -> StageForecast:
        """The packed model's logits here, then those of the written one in a fresh process (audit.py)."""
        mine = self.now + self.packed
        return StageForecast("checkpoint", self.seconds.checkpoint(), mine, self.now + self.packed + PROCESS_BYTES)

    def evaluate(self) -> StageForecast:
        """The original's answers (base_logits.py), then the packed model's (evaluate.py), then a sample of both.

        Answers that are too many to be kept are given anew, by the original beside the packed model.
        """
        run = self.run
        assert run.texts.evaluation is not None
        seq_len = run.texts.evaluation.tokens.shape[1]
        num_logits, batch = seq_len * self.answer_width, batch_of(seq_len, self.answer_width)
        original = self._original(seq_len) + (FLOAT32_BYTES + LOG_PROB_BYTES) * num_logits
        kept = round(self.memory.kept_bytes_a_token * seq_len)
        scored = self.packed + batch * (FLOAT32_BYTES * num_logits + kept) + LOG_PROB_BYTES * num_logits
        scored += SLICE_BYTES * SLICE_TOKENS * self.answer_width
        samples = self._loaded + HEAP_BYTES if self._is_whole else 0
        answers = (
            original + scored
            if cache_bytes(run.model.config, run.texts.evaluation.tokens) > LIMIT_BYTES
            else max(original, scored)
        )
        return self._stage("evaluate", self.seconds.evaluate(), max(answers, samples), self._moved)

    def report(self) -> StageForecast:
        """Pictures."""
        return self._host("report", self.seconds.report(), self.now + REPORT_BYTES)

    @property
    def _is_whole(self) -> bool:
        """See pipeline.unloaded.is_whole."""
        return is_whole(self.run.model, self.run.device) or not self.memory.block_bytes

    @property
    def _loaded(self) -> int:
        """The whole model while it is loaded, with the files that are mapped for it."""
        return self.memory.weight_bytes + self.run.model.size_bytes

    def _original(self, seq_len: int) -> int:
        held = self.memory.around_bytes + self.memory.largest_block_bytes
        held = self._loaded if self._is_whole else held
        return HEAP_BYTES + held + round(self.memory.kept_bytes_a_token * seq_len)

    @property
    def _moved(self) -> int:
        """What is made in the machine's memory before it is moved to a GPU: the original, or the packed model."""
        return max(self._loaded, self.packed) if self._is_whole else self.packed

    def _on_gpus(self, name: str, seconds: float, each: list[int]) -> StageForecast:
        """Matrices in streams (spread_gpus.py), read in the machine's memory; by the seconds of its cores, for no GPU
        was measured."""
        kind = sums_of(self.run.recipe.sensitivity) if self.metric else None  # type: ignore[arg-type]
        read = [
            matrix.num_params + sum(map(math.prod, kind.shapes(matrix.shape).values()) if kind else ())
            for matrix in self.run.model.matrices
        ]
        slots = [num_slots(device, each) for device in gpus_of(self.run.device)]
        host = self.now + sum(slots) * FLOAT32_BYTES * max(read)
        return StageForecast(name, seconds, host, host, slots[0] * (SLOT_BYTES + max(each)))

    def _host(self, name: str, seconds: float, nbytes: int) -> StageForecast:
        return StageForecast(name, seconds, nbytes, nbytes)

    def _stage(self, name: str, seconds: float, network: int, beside: int) -> StageForecast:
        """Where the network is on the run's device, and something before or after it in the machine's memory."""
        if self.device.type == "cpu":
            return self._host(name, seconds, self.now + max(network, beside))
        return StageForecast(name, seconds, self.now + beside, self.now + beside, network)
