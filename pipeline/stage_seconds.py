"""About how many seconds the stages of a run take.

Passes over the model are counted in operations, and this machine's speed is measured (machine_speed.py). Work on single
matrices was measured on a core of REFERENCE_FLOPS (quantizers state theirs for it too), and is scaled by that speed.
"""

import math
from dataclasses import dataclass

from pipeline.allocation import Offered, free_to_choose
from pipeline.curvature_sums import sums_of
from pipeline.embedding_costs import MOST_WINDOWS
from pipeline.embedding_steps import weighs_head
from pipeline.embeddings import PACK_SECONDS, gives_logits, packable
from pipeline.evaluate import batch_of
from pipeline.machine_speed import flops
from pipeline.parallel import num_cores
from pipeline.quality import SAMPLE_TOKENS
from pipeline.run import Run
from quantizers import quantizer_from_label

REFERENCE_FLOPS = 140e9  # in float32
EFFICIENCY = 0.5  # of a pass, as a share of a large product's speed
DRAW_SECONDS = 8e-9  # for each probability that a label is drawn from
COSTS_SECONDS = {"diagonal": 0.025, "curvature": 0.02}  # for a million weights, and each choice without low rank
COSTS_FACTOR_SECONDS = 1e-10  # for each number of a curvature's side, cubed: its factors, and products with them
QUANTIZE_FACTOR_SECONDS = 4e-11
MATRIX_SECONDS = 0.05
DEQUANTIZE_SECONDS = {"block": 3e-9, "integer": 1e-8, "learned": 1e-8}  # for each weight, by the kind of its format
MOST_DEQUANTIZE_SECONDS = 5e-8  # of the other kinds, lattices and trellises
SCORE_SECONDS = 3e-8  # for each probability
SAMPLE_SECONDS = 4e-10  # for each parameter and token, which are read from memory
START_SECONDS = 8.0  # of a process that loads torch and transformers, and of writing files
REPORT_SECONDS = 6.0


@dataclass(frozen=True)
class StageSeconds:
    """Of one run."""

    run: Run

    @property
    def _flops(self) -> float:
        return EFFICIENCY * flops(self.run.device)

    @property
    def _slowness(self) -> float:
        """Of one core here, beside the one that was measured."""
        return REFERENCE_FLOPS * num_cores() / flops("cpu")

    @property
    def _pass_flops(self) -> float:
        """Of one token forward, or of its gradient back to the inputs."""
        return 2.0 * self.run.model.num_params

    @property
    def _curved_sides(self) -> int:
        metric = self.run.recipe.sensitivity
        return 0 if metric == "none" else sum("curvature" in name for name in sums_of(metric).shapes((1, 1)))

    @property
    def _has_curvature(self) -> bool:
        return self._curved_sides > 0

    def statistics(self) -> float:
        """One pass there; one back, and for blocks that are not held at once another there; and the sums."""
        run = self.run
        assert run.texts.calibration is not None
        kind, num_tokens = sums_of(run.recipe.sensitivity), run.texts.calibration.tokens.numel()  # type: ignore[arg-type]
        matrices = run.model.matrices
        sizes = [size for m in matrices for size in kind.shapes(m.shape).values()]
        if self._has_curvature:
            sums = 2.0 * sum(rows * columns for rows, columns in sizes)
        else:
            sums = 3.0 * run.model.num_matrix_params
        passes = (1 if kind.of_input_alone else 2.5) + (weighs_head(run) and not free_to_choose(run.embeddings))
        seconds = num_tokens * (passes * self._pass_flops + sums) / self._flops
        if kind.scaled_by_divergence:  # a pass from there to the end for every matrix, of two windows
            seconds += len(matrices) * run.texts.calibration.tokens.shape[1] * self._pass_flops / self._flops
        if kind.labels_are_drawn:
            seconds += DRAW_SECONDS * num_tokens * run.model.task.answer_width(run.model.config)
            seconds += QUANTIZE_FACTOR_SECONDS * self._cubes * self._slowness
        return seconds

    def costs(self, workers: int) -> float:
        """Each matrix under all choices."""
        millions = self.run.model.num_matrix_params / 1e6
        kind = "curvature" if self._has_curvature else "diagonal"
        choices = [label for label in self.run.labels if not quantizer_from_label(label).format.rank]
        seconds = COSTS_SECONDS[kind] * millions * len(choices) + MATRIX_SECONDS * len(self.run.model.matrices)
        seconds += COSTS_FACTOR_SECONDS * self._cubes
        return seconds * self._slowness / workers

    def embeddings(self) -> float:
        """A pass for what the head reads, packing all that is on offer, and a few windows with each of them."""
        free, windows = free_to_choose(self.run.embeddings), self.run.texts.calibration
        assert windows is not None
        num_tokens = min(MOST_WINDOWS, len(windows)) * windows.tokens.shape[1]
        num_passes = 1 + sum(len(packable(choices)) for choices in free.values())
        a_token = self._pass_flops / self._flops
        a_token += SCORE_SECONDS * self.run.model.task.answer_width(self.run.model.config)
        head = weighs_head(self.run) * windows.tokens.numel() * self._pass_flops / self._flops
        return head + num_passes * num_tokens * a_token + self._packing(free) * self._slowness

    def _packing(self, offered: Offered) -> float:
        """Each of the choices, on the core that was measured."""
        return sum(
            PACK_SECONDS[weighs_head(self.run) and gives_logits(self.run.model, module)] * math.prod(embedding.shape)
            for module, choices in offered.items()
            for embedding in packable(choices)
        )

    def plan(self) -> float:
        """The integer program."""
        return 1.0 + 2e-5 * len(self.run.model.matrices) * len(self.run.labels)

    def decompose(self, workers: int) -> float:
        """By the mean of the choices, for which of them will be taken is not known yet."""
        millions = self.run.model.num_matrix_params / 1e6
        each = [quantizer_from_label(label).seconds_per_million(self._curved_sides) for label in self.run.labels]
        seconds = millions * sum(each) / len(each) + QUANTIZE_FACTOR_SECONDS * self._cubes
        free = free_to_choose(self.run.embeddings)
        fixed = {module: choices for module, choices in self.run.embeddings.items() if module not in free}
        return (seconds / workers + self._packing(fixed)) * self._slowness + START_SECONDS

    def recover(self) -> float:
        """The original's pass over all windows, and two passes for each of a step's."""
        run = self.run
        assert run.texts.recovery is not None
        settings, tokens = run.recovery_settings, run.texts.recovery.tokens
        num_checks = 1 + settings.steps // settings.check_every
        windows = 3 * settings.steps * settings.batch_windows
        windows += len(tokens) + num_checks * settings.num_held_out(len(tokens))
        return windows * tokens.shape[1] * self._pass_flops / self._flops

    def checkpoint(self) -> float:
        """Here, and in a process of its own."""
        return 2 * START_SECONDS + 2 * self._dequantize_seconds

    def evaluate(self) -> float:
        """The original and the packed model, and a sample of the latter."""
        run = self.run
        assert run.texts.evaluation is not None
        windows, seq_len = run.texts.evaluation.tokens.shape
        answer_width = run.model.task.answer_width(run.model.config)
        passes = (
            2 * windows * seq_len * self._pass_flops / self._flops + SCORE_SECONDS * windows * seq_len * answer_width
        )
        dequantized = math.ceil(windows / batch_of(seq_len, answer_width)) + 1
        return (
            passes
            + dequantized * self._dequantize_seconds
            + 2 * SAMPLE_TOKENS * SAMPLE_SECONDS * run.model.num_params
            + START_SECONDS
        )

    def report(self) -> float:
        """Pictures."""
        return REPORT_SECONDS

    @property
    def _dequantize_seconds(self) -> float:
        """Of all matrices, by the slowest kind on offer."""
        kinds = {quantizer_from_label(label).format.kind for label in self.run.labels}
        slowest = max(DEQUANTIZE_SECONDS.get(kind, MOST_DEQUANTIZE_SECONDS) for kind in kinds)
        return slowest * self.run.model.num_matrix_params

    @property
    def _cubes(self) -> float:
        """Of the sides of all curvatures."""
        if not self._has_curvature:
            return 0.0
        kind = sums_of(self.run.recipe.sensitivity)  # type: ignore[arg-type]
        sides = [size[0] for matrix in self.run.model.matrices for size in kind.shapes(matrix.shape).values()]
        return sum(float(side) ** 3 for side in sides)
