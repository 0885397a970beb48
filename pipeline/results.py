"""What the stages of a run left in the registry, read back from their artifacts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.allocation import Plan
from pipeline.costs import CostTable
from pipeline.decompose import matrix_file
from pipeline.eval_report import EvalReport
from pipeline.recovered import KEPT_FILE, REPORT_FILE, read_kept, read_report
from pipeline.recovery_report import RecoveryReport
from pipeline.statistics import Statistics
from registry import Artifact, Registry


@dataclass(frozen=True)
class Results:
    """Readers of artifacts; each raises RegistryError where a file is not in the registry."""

    registry: Registry

    def statistics(self, statistics: Artifact | None) -> Statistics | None:
        """The metric of every matrix; None for an unweighted error."""
        if statistics is None:
            return None
        paths = {name: self.registry.path(statistics, name) for name in statistics.files}
        return Statistics.open(paths.__getitem__)  # unlike a lambda it travels to other processes

    def cost_table(self, costs: Artifact) -> CostTable:
        """The cost of every choice."""
        return CostTable.read(self.registry.path(costs, "costs.json"))

    def plan(self, plan: Artifact) -> Plan:
        """What every matrix gets."""
        return Plan.read(self.registry.path(plan, "plan.json"))

    def comparison(self, plan: Artifact, tokens_sha256: str) -> dict[str, Any] | None:
        """How the program's plan and its uniform rival did on these tokens; None where `plan` was not compared.

        {"rival": "uniform LABEL", "plan_kl": nats a token, "rival_kl": nats a token}
        """
        for made in self.registry.children(plan.digest):
            settings = made.metadata.get("settings")  # of a stranger's, anything
            is_asked = isinstance(settings, dict) and settings.get("tokens") == tokens_sha256
            if made.kind == "comparison" and is_asked and self.registry.was_made_here(made.digest):
                content: dict[str, Any] = json.loads(self.registry.path(made, "comparison.json").read_text())
                return content if "rival" in content else None  # earlier ones did not name it
        return None

    def matrix_path(self, matrices: Artifact) -> Callable[[str], Path]:
        """Module name -> file of its quantized matrix."""
        return lambda module: self.registry.path(matrices, matrix_file(module))

    def kept(self, matrices: Artifact) -> dict[str, Tensor]:
        """Tensors beside the matrices that a recovery changed, by parameter name."""
        return read_kept(self.registry.path(matrices, KEPT_FILE)) if KEPT_FILE in matrices.files else {}

    def recovery(self, matrices: Artifact) -> RecoveryReport | None:
        """What a recovery did to the matrices; None if there was none."""
        return read_report(self.registry.path(matrices, REPORT_FILE)) if REPORT_FILE in matrices.files else None

    def evaluation(self, evaluation: Artifact | None) -> dict[str, Any] | None:
        """evaluation.json: figures, samples, and the text's name; None if there was none."""
        if evaluation is None:
            return None
        return json.loads(self.registry.path(evaluation, "evaluation.json").read_text())

    def eval_report(self, evaluation: Artifact | None) -> EvalReport | None:
        """The figures in it."""
        content = self.evaluation(evaluation)
        return EvalReport.from_json(content["report"]) if content else None
