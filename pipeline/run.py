"""One run of a recipe: each stage's key and settings, what it reads, and what it leaves.

`Registry.step` runs a stage only where nobody has done that work; the methods here say what decides each
stage's result. They take and give artifacts, so that a flow can call them one by one. results.py reads artifacts,
disk_space.py says how much a run writes.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.allocation import (
    Offered,
    Plan,
    allocate_to_budget,
    check_shared_choices,
    free_to_choose,
    offered_choices,
    smallest_bits_of,
)
from pipeline.atomic import replace_file, write_json
from pipeline.audit import audit, fixed_answer
from pipeline.budget import Budget
from pipeline.calibration import TokenWindows
from pipeline.checkpoint import Checkpoint
from pipeline.costs import SIGNIFICANT_DIGITS, CostTable, check_ranks, choices_of, cost_table, measure_costs
from pipeline.decompose import decompose, read_error
from pipeline.disk_space import disk_may_fill
from pipeline.embedding_steps import (
    embedding_costs,
    has_embedding_costs,
    has_head_curvature,
    head_curvature,
    packed_embedding,
    with_costs,
)
from pipeline.embeddings import offered_embeddings
from pipeline.errors import RecipeError
from pipeline.evaluate import evaluate
from pipeline.model import Model, open_model
from pipeline.origin import without_local_folders
from pipeline.output import OutputFolder
from pipeline.packed import packed_model
from pipeline.packed_sizes import PackedSizes
from pipeline.progress import Progress
from pipeline.quality import measured, original_logits
from pipeline.recipe import Recipe, check_trainable
from pipeline.recovered import recover_matrices
from pipeline.recovery_settings import RecoverySettings
from pipeline.report import ReportFacts, write_report
from pipeline.results import Results
from pipeline.rival import rival_of
from pipeline.spread import Spread, over_cores
from pipeline.spread_gpus import over_gpus
from pipeline.stages import StageLog
from pipeline.statistics import FACTS_FILE, SpreadParts, collect_statistics, notes_of
from pipeline.teacher import TeacherWindows, teacher_windows
from pipeline.texts import Texts
from pipeline.training import compute_of
from pipeline.unloaded import original_network
from pipeline.version import TOOLS, VERSION
from registry import Artifact, Registry


@dataclass(frozen=True)
class Run:
    """A checked recipe with its model open and its texts tokenized; nothing written yet."""

    recipe: Recipe
    model: Model
    registry: Registry
    device: str
    resume: bool
    texts: Texts
    offered: dict[str, list[str]]
    log: StageLog
    progress: Progress
    spread: Spread | None = None
    spread_parts: SpreadParts | None = None

    @staticmethod
    def prepare(
        recipe: Recipe, registry: Registry, *, device: str, resume: bool, log: StageLog, progress: Progress
    ) -> "Run":
        """Open the model, tokenize the texts, and find out now whether anything cannot work later.

        No weight is looked at yet: Model.check_finite, which takes a second per GB, comes when memory and disk are
        known to suffice.

        Raises:
            ModelError, CalibrationError, RecipeError, BudgetError: see pipeline/errors.py.
        """
        run = Run.open(recipe, registry, device=device, resume=resume, log=log, progress=progress)
        run.smallest_plan()
        return run

    @staticmethod
    def open(
        recipe: Recipe, registry: Registry, *, device: str, resume: bool, log: StageLog, progress: Progress
    ) -> "Run":
        """`prepare` without a look at the budget."""
        model = open_model(
            recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code, progress=progress
        )
        check_ranks(model.matrices, recipe.ranks)
        check_trainable(recipe)
        if recipe.recover and not model.task.generates and (recipe.recover_hidden_weight or recipe.recover_ce_weight):
            raise RecipeError(
                f"{recipe.model} is an encoder, which has neither an output head nor next tokens. Leave "
                "--recover-hidden-weight and --recover-ce-weight at 0: the divergence of its features is trained on."
            )
        offered_embeddings(model, recipe)  # refuses what cannot be packed
        overrides = dict(recipe.overrides)
        labels = choices_of(recipe.candidates, recipe.ranks, recipe.factor_bits)
        offered = offered_choices(model.matrices, labels, overrides)
        if recipe.share_groups:
            check_shared_choices(model.matrices, offered)
        texts = Texts.of(recipe, model, progress)
        return Run(recipe, model, registry, device, resume, texts, offered, log, progress)

    @property
    def facts(self) -> dict[str, Any]:
        """recipe.json: the recipe, and what its words stood for on the day.

        It is published, and decides what a stage's result is called: of a local model or text it has the name, and
        the hash of what was read.
        """
        calibration, recovery, evaluation = self.texts.calibration, self.texts.recovery, self.texts.evaluation
        text = calibration or recovery
        stood_for: dict[str, Any] = {
            "bitsmith": VERSION,
            "calibration_commit": text.revision if text else None,
            "calibration_sha256": calibration.sha256 if calibration else None,
            "evaluation_sha256": evaluation.sha256 if evaluation else None,
            "recovery_sha256": recovery.sha256 if recovery else None,
            "model_sha256": self.model.digest,
            "model_commit": self.model.revision,
        }
        if self.model.trust_remote_code:  # which a recipe may say of a model that brings no code
            stood_for["runs_own_code"] = True
        return without_local_folders(self.recipe.to_json() | stood_for)

    @property
    def results(self) -> Results:
        """What the stages left, read back."""
        return Results(self.registry)

    @cached_property
    def labels(self) -> list[str]:
        """All choices of the cost table."""
        return list(dict.fromkeys(label for offered in self.offered.values() for label in offered))

    @cached_property
    def embeddings(self) -> Offered:
        """What is on offer for token embeddings and head; empty where they stay as they are."""
        return offered_embeddings(self.model, self.recipe)

    def smallest_plan(self) -> Plan:
        """Any plan within the budget, by sizes alone; raises BudgetError if there is none."""
        return self._allocate(self._without_costs, self.embeddings)

    @property
    def smallest_bits(self) -> int:
        """Of the matrices: no plan takes less."""
        return smallest_bits_of(self._without_costs, self.recipe.share_groups)

    @cached_property
    def _without_costs(self) -> CostTable:
        """All sizes, and no errors."""
        return cost_table(self.model.matrices, self.offered, cost=lambda name, label: 0.0)

    @cached_property
    def sizes(self) -> PackedSizes:
        """What the result takes at most."""
        return PackedSizes(self.model, Budget.parse(self.recipe.budget), self.offered, self.embeddings)

    @property
    def recovery_settings(self) -> RecoverySettings:
        """Of the training that the recipe asks for, if it does."""
        recipe = self.recipe
        settings = {
            "train": recipe.recover_train,
            "steps": recipe.recover_steps,
            "learning_rate": recipe.recover_learning_rate,
            "kl_weight": recipe.recover_kl_weight,
            "hidden_weight": recipe.recover_hidden_weight,
            "ce_weight": recipe.recover_ce_weight,
            "compute": compute_of(self.device),
            "seed": recipe.seed,
        }
        return RecoverySettings.model_validate(settings)

    def has_statistics(self) -> bool:
        """Are the statistics in the registry, and what packing needs? True where the recipe wants none."""
        if self.texts.calibration is None:
            return True
        has_curvature = bool(free_to_choose(self.embeddings)) or has_head_curvature(self)
        return self._found_statistics() is not None and has_curvature

    def statistics_work_bytes(self) -> int:
        """What is on the disk of statistics that somebody is collecting, or was killed over."""
        return self.registry.step_work_bytes("statistics", (), self.keyed(self._statistics_settings()))

    def found_costs(self) -> Artifact | None:
        """The cost table, if it is in the registry with the statistics that it is of."""
        statistics = self._found_statistics()
        if self.texts.calibration is not None and statistics is None:
            return None
        return self.registry.has_step("costs", _digests(statistics), self.keyed(self._costs_settings()))

    def has_costs(self) -> bool:
        """Are statistics and cost table in the registry?"""
        return self.found_costs() is not None

    def statistics(self) -> Artifact | None:
        """The metric of every matrix; None for an unweighted error."""
        windows, metric, seed = self.texts.calibration, self.recipe.sensitivity, self.recipe.seed
        if windows is None or metric == "none":
            return None
        if not free_to_choose(self.embeddings):
            head_curvature(self)

        is_new = False

        def build(work: Path) -> dict[str, Any]:
            nonlocal is_new
            is_new = True
            collect_statistics(
                self.model,
                windows,
                metric,
                work,
                seed=seed,
                device=self.device,
                spread=self.spread_parts,
                progress=self.progress,
            )
            return {"source": windows.source, "num_windows": len(windows), "seq_len": windows.tokens.shape[1]}

        statistics = self._step("statistics", (), self._statistics_settings(), build)
        for note in () if is_new else self._notes(statistics):
            self.progress.say(note)
        return statistics

    def _notes(self, statistics: Artifact | None) -> tuple[str, ...]:
        """Read alone: the sums may be gigabytes in a store elsewhere."""
        return notes_of(self.registry.path(statistics, FACTS_FILE)) if statistics else ()

    def costs(self, statistics: Artifact | None) -> Artifact:
        """The cost table."""

        def build(work: Path) -> None:
            measure_costs(
                self.model,
                self.results.statistics(statistics),
                self.offered,
                num_rows=self.recipe.cost_rows,
                seed=self.recipe.seed,
                work=work,
                device=self.device,
                spread=self._spread,
                progress=self.progress,
            )

        return self._step("costs", _digests(statistics), self._costs_settings(), build)

    def embedding_costs(self) -> Artifact | None:
        """What each way to pack embeddings and head costs; None where there is no choice."""
        if self.resume and has_embedding_costs(self):
            self.log.reused()
        return embedding_costs(self, anew=not self.resume)

    def plan(self, costs: Artifact, statistics: Artifact | None) -> Artifact:
        """The integer program's answer, or its uniform rival where that was measured to be better (rival.py)."""
        first = self._plan(costs, {}, lambda: self.allocate(costs))
        rival = rival_of(self.results.plan(first), self.results.cost_table(costs))
        if rival is None or self.texts.evaluation is None or not self._fits(rival):
            return first
        second = self._plan(costs, {"uniform": rival.status}, lambda: rival)
        quantized = [self.matrices(plan, statistics) for plan in (first, second)]

        def build(work: Path) -> None:
            measured = [
                self._divergence(packed_model(self.model, self.results.plan(plan), self.results.matrix_path(matrices)))
                for plan, matrices in zip((first, second), quantized, strict=True)
            ]
            (work / "out").mkdir(exist_ok=True)
            compared = {"rival": rival.status.partition(",")[0], "plan_kl": measured[0], "rival_kl": measured[1]}
            write_json(work / "out" / "comparison.json", compared)

        settings = {"model": self.model.digest, "tokens": self.texts.evaluation.sha256, "device": self.device}
        parents = (first.digest, second.digest, *(matrices.digest for matrices in quantized))
        compared = self._step("comparison", parents, settings, build)
        measured = json.loads(self.registry.path(compared, "comparison.json").read_text())
        rival_kl, plan_kl = (float(f"{measured[name]:.{SIGNIFICANT_DIGITS}g}") for name in ("rival_kl", "plan_kl"))
        return second if rival_kl < plan_kl else first

    def _fits(self, plan: Plan) -> bool:
        """A plan of no more bits may have a larger folder: more tensors, longer labels."""
        limit = Budget.parse(self.recipe.budget).limit_bytes(self.model.size_bytes)
        return limit is None or Checkpoint(self.model, plan, self.facts).size_bytes <= limit

    @property
    def _spread(self) -> Spread:
        here: Spread = partial(over_cores, log=self.log)
        return self.spread or (over_gpus if self._device_settings else here)

    @property
    def _device_settings(self) -> dict[str, str]:
        """Of what is made matrix by matrix: the results of two GPUs of a kind are the same."""
        kind = torch.device(self.device).type
        return {} if kind == "cpu" else {"device": kind}

    def _plan(self, costs: Artifact, settings: dict[str, Any], make: Callable[[], Plan]) -> Artifact:
        of_embeddings = embedding_costs(self)

        def build(work: Path) -> None:
            (work / "out").mkdir(exist_ok=True)
            make().write(work / "out" / "plan.json")

        return self._step("plan", _digests(costs, of_embeddings), self.facts | settings, build)

    def allocate(self, costs: Artifact, elsewhere: Registry | None = None) -> Plan:
        """The same, not recorded.

        Args:
            elsewhere: where what embeddings cost is measured if it is not in the registry.
        """
        where = replace(self, registry=elsewhere) if elsewhere and not has_embedding_costs(self) else self
        return self._allocate(self.results.cost_table(costs), with_costs(where, embedding_costs(where)))

    def matrices(self, plan: Artifact, statistics: Artifact | None) -> Artifact:
        """Every matrix quantized as planned."""
        chosen = self.results.plan(plan)
        labels = {name: matrix.label for name, matrix in chosen.matrices.items()}
        settings = {"model": self.model.digest, "labels": labels} | self._device_settings
        embeddings = [packed_embedding(self, *planned) for planned in chosen.embeddings.items()]

        def build(work: Path) -> None:
            learnt = self.results.statistics(statistics)
            decompose(self.model, chosen, learnt, work, device=self.device, spread=self._spread, progress=self.progress)
            for packed in embeddings:
                for name in packed.files:
                    replace_file(work / "out" / name, partial(shutil.copyfile, self.registry.path(packed, name)))

        return self._step("matrices", _digests(statistics, *embeddings), settings, build)

    def teacher(self) -> Artifact:
        """The original's answers to the windows that recovery trains on: the same at every budget."""
        settings, windows = self.recovery_settings, self._recovery_windows
        num_top, with_hidden = settings.num_top, settings.hidden_weight > 0

        def build(work: Path) -> None:
            teacher_windows(
                partial(original_network, self.model, self.device),
                windows.tokens,
                work / "out",
                num_top=num_top,
                with_hidden=with_hidden,
                progress=self.progress,
            )

        asked = {"num_top": num_top, "with_hidden": with_hidden}
        keyed = {"model": self.model.digest, "tokens": windows.sha256, "device": self.device} | asked
        # not `_step`: found or not, the stage is recovery; and every budget of a run that starts over shares them
        return self.registry.step("teacher", (), self.keyed(keyed), build, progress=self.progress)

    @property
    def _recovery_windows(self) -> TokenWindows:
        assert self.texts.recovery is not None, "a recipe with recovery has windows for it"
        return self.texts.recovery

    def recovered(self, plan: Artifact, matrices: Artifact, statistics: Artifact | None) -> Artifact:
        """The matrices after recovery, to take their place, and the norms that were trained with them."""
        settings, windows = self.recovery_settings, self._recovery_windows

        def build(work: Path) -> None:
            teacher = self.teacher()
            recover_matrices(
                self.model,
                self.results.plan(plan),
                self.results.statistics(statistics),
                self.results.matrix_path(matrices),
                TeacherWindows(lambda name: self.registry.path(teacher, name), windows.tokens),
                settings,
                work,
                device=self.device,
                progress=self.progress,
            )

        keyed = {"model": self.model.digest, "tokens": windows.sha256, "device": self.device}
        return self._step("recovered", (matrices.digest,), keyed | settings.model_dump(mode="json"), build)

    def checkpoint(self, plan: Artifact, matrices: Artifact) -> Artifact:
        """The finished folder's files."""
        folder = Checkpoint(self.model, self.results.plan(plan), self.facts)

        def build(work: Path) -> dict[str, Any]:
            (work / "out").mkdir(exist_ok=True)
            folder.write(
                work / "out", self.results.matrix_path(matrices), self.results.kept(matrices), progress=self.progress
            )
            return {"bits_per_param": folder.plan.bits_per_param, "model": self.facts["model"]}

        return self._step("checkpoint", (plan.digest, matrices.digest), self.facts, build)

    def deliver(self, checkpoint: Artifact, plan: Artifact, matrices: Artifact, output: OutputFolder) -> None:
        """Put the checkpoint into its place once it has passed its audit in a fresh process."""
        if not output.is_finished():
            with output.alone(lambda: self.progress.say(f"Another process writes {output.path}; waiting for it")):
                if not output.is_finished():
                    self._write_audited(checkpoint, plan, matrices, output)
                    return
        output.check_unchanged(self.registry, checkpoint)

    def _write_audited(self, checkpoint: Artifact, plan: Artifact, matrices: Artifact, output: OutputFolder) -> None:
        with disk_may_fill(self, output.path.parent):
            staged = output.stage(self.registry, checkpoint)
        for _ in self.progress.track(["audit"], "Audit in a fresh process", total=1):
            in_memory = packed_model(
                self.model, self.results.plan(plan), self.results.matrix_path(matrices), self.results.kept(matrices)
            )
            expected = fixed_answer(in_memory)
            del in_memory  # one copy at a time
            audit(staged, expected, trust_remote_code=self.model.trust_remote_code)
        output.finish()

    def evaluation(self, checkpoint: Artifact, folder: Path) -> Artifact | None:
        """Quality beside the original, with a sample of both; None if the recipe asks for none."""
        windows = self.texts.evaluation
        if windows is None:
            return None
        settings = {"model": self.model.digest, "tokens": windows.sha256, "device": self.device}

        def build(work: Path) -> None:
            content = measured(self.model, folder, windows, self.device, work / "scores", self.progress)
            (work / "out").mkdir(exist_ok=True)
            write_json(work / "out" / "evaluation.json", content)

        return self._step("evaluation", (checkpoint.digest,), settings, build)

    def report(
        self,
        costs: Artifact,
        plan: Artifact,
        matrices: Artifact,
        checkpoint: Artifact,
        evaluation: Artifact | None,
    ) -> Artifact:
        """The HTML report, its pictures and the figures behind it."""

        def build(work: Path) -> None:
            (work / "out").mkdir(exist_ok=True)
            chosen = self.results.plan(plan)
            facts = ReportFacts(
                model=self.model,
                plan=chosen,
                table=self.results.cost_table(costs),
                errors={name: read_error(self.results.matrix_path(matrices)(name)) for name in chosen.matrices},
                recipe=self.facts,
                size_bytes=checkpoint.size_bytes,
                checkpoint_digest=checkpoint.digest,
                evaluation=self.results.evaluation(evaluation),
                recovery=self.results.recovery(matrices),
                notes=self._notes(self.registry.get(costs.parents[0]) if costs.parents else None),
                rival=self.results.comparison(plan, self.texts.evaluation.sha256) if self.texts.evaluation else None,
            )
            write_report(facts, work / "out", progress=self.progress)

        return self._step("report", (checkpoint.digest, costs.digest, *_digests(evaluation)), {}, build)

    def _divergence(self, network: PreTrainedModel) -> float:
        """From the original, on the evaluation windows, in nats a token."""
        assert self.texts.evaluation is not None
        tokens = self.texts.evaluation.tokens
        network.to(torch.device(self.device))  # type: ignore[arg-type]
        original = original_logits(self.model, tokens, self.device, self.progress)
        return evaluate(network, original, tokens, progress=self.progress).kl_divergence.mean

    def _step(self, kind: str, parents: tuple[str, ...], settings: dict, build: Callable[[Path], Any]) -> Artifact:
        settings = self.keyed(settings)
        if self.resume and (done := self.registry.finished_step(kind, parents, settings, self.progress)):
            self.log.reused()
            return done

        def build_and_note_tools(work: Path) -> dict[str, Any]:
            return (build(work) or {}) | {"tools": TOOLS}

        with disk_may_fill(self, self.registry.root):
            return self.registry.step(
                kind, parents, settings, build_and_note_tools, resume=self.resume, progress=self.progress
            )

    def keyed(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, with the code that they are for."""
        return settings | {"bitsmith": VERSION}

    def _found_statistics(self) -> Artifact | None:
        if self.texts.calibration is None:
            return None
        return self.registry.has_step("statistics", (), self.keyed(self._statistics_settings()))

    def _statistics_settings(self) -> dict[str, Any]:
        tokens = self.texts.calibration.sha256 if self.texts.calibration else None
        metric, seed = self.recipe.sensitivity, self.recipe.seed
        settings = {"model": self.model.digest, "tokens": tokens, "device": self.device, "metric": metric, "seed": seed}
        return settings | ({"experts": "apart"} if self.model.experts_apart else {})

    def _costs_settings(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "model": self.model.digest,
            "offered": self.offered,
            "num_rows": recipe.cost_rows,
            "seed": recipe.seed,
        } | self._device_settings

    def _allocate(self, table: CostTable, embeddings: Offered) -> Plan:
        return allocate_to_budget(
            table,
            Budget.parse(self.recipe.budget),
            self.model.size_bytes,
            lambda plan: Checkpoint(self.model, plan, self.facts).size_bytes,
            solver=self.recipe.solver,
            share_groups=self.recipe.share_groups,
            embeddings=embeddings,
            can_pack_embeddings=bool(self.model.embeddings),
        )


def _digests(*artifacts: Artifact | None) -> tuple[str, ...]:
    return tuple(artifact.digest for artifact in artifacts if artifact)
