"""Facts of a run that never was: a real tiny model, a cost table in which each bit quarters the error."""

import math
from pathlib import Path
from typing import Any

from pipeline.allocation import allocate
from pipeline.costs import CostTable, cost_table
from pipeline.eval_report import Estimate, EvalReport
from pipeline.figures import ReportFacts
from pipeline.model import Model, open_model
from pipeline.recipe import Recipe
from quantizers import quantizer_from_label

LABELS = [f"lloyd{bits}-g{group}-s4{rank}" for bits in (2, 3, 4) for group in (32, 64) for rank in ("", "-r2")]


def made_up_cost(name: str, label: str) -> float:
    """Later layers are more sensitive, small groups and a low-rank part help a little."""
    form = quantizer_from_label(label).format
    layer = int(next(part for part in name.split(".") if part.isdigit()))
    return (1 + layer) * 4.0**-form.bits * (form.block_size / 64) ** 0.2 * (0.9 if form.rank else 1.0)


def made_up_table(model: Model) -> CostTable:
    return cost_table(model.matrices, {matrix.name: LABELS for matrix in model.matrices}, made_up_cost)


def made_up_evaluation() -> dict[str, Any]:
    report = EvalReport(
        perplexity=Estimate(21.4375, 0.53125),
        base_perplexity=Estimate(20.125, 0.5),
        kl_divergence=Estimate(0.0625, 0.0078),
        kl_p99=0.71,
        top1_agreement=Estimate(0.875, 0.0125),
        num_tokens=189,
        num_windows=3,
        seq_len=64,
        tokens_sha256="e" * 64,
    )
    samples = {"original": "Light scatters.", "compressed": "Light scatters, mostly."}
    return {
        "report": report.to_json(),
        "prompt": "Why?",
        "samples": samples,
        "text": "bundled:evaluation.txt",
    }


def made_up_facts(folder: Path, *, evaluated: bool = True, **settings: Any) -> ReportFacts:
    """Facts about the model in `folder` at 3.5 bits per parameter; `settings` go into the recipe."""
    model = open_model(str(folder))
    table = made_up_table(model)
    budget_bits = int(3.5 * int(table.num_params.sum()))
    plan = allocate(table, budget_bits, budget="3.5bpw", solver="highs", share_groups=False)
    recipe = Recipe.of(model="tiny", budget="3.5bpw", ranks=(2,), candidates=tuple(LABELS[::2]))
    facts = {
        "bitsmith": "1.2.3",
        "calibration_sha256": "c" * 64,
        "evaluation_sha256": "e" * 64,
        "recovery_sha256": None,
        "model_sha256": model.digest,
        "model_commit": None,
    }
    return ReportFacts(
        model=model,
        plan=plan,
        table=table,
        errors={name: 1.05 * matrix.cost for name, matrix in plan.matrices.items()},
        recipe=recipe.to_json() | facts | settings,
        size_bytes=math.ceil(plan.size_bits / 8) + model.size_bytes,
        checkpoint_digest="d" * 64,
        evaluation=made_up_evaluation() if evaluated else None,
    )
