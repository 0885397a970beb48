"""What a finetuning did: figures, one page with the loss curve, and a README for the adapter.

finetune.json            the figures
report/index.html        one page that needs nothing else
report/loss.png          training and held-out loss by step
README.md                what it is, of what, and how to load it
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.atomic import replace_file
from pipeline.charts import DARK, LIGHT, draw_losses, png
from pipeline.markdown import markdown_template
from pipeline.report import data_url, render

if TYPE_CHECKING:
    from pipeline.conversations import Examples
    from pipeline.errors import NonFiniteError
    from pipeline.finetune_settings import FinetuneSettings
    from pipeline.training_state import TrainingState

DIGITS = 6  # significant: the last bits of a sum are not the same from machine to machine


@dataclass(frozen=True)
class FinetuneReport:
    """Losses are mean cross-entropies of the answers' tokens, in nats.

    Attributes:
        base: name of the checkpoint's folder.
        steps: that were taken.
        kept_step: of the values that the adapter has.
        has_gained: whether the held-out loss fell; otherwise the values are the last.
        num_trained: parameters.
        num_train, num_held_out: examples.
        num_without_answer, num_too_long, num_refused: rows of the dataset that were left out, see conversations.py.
        losses: of every step's examples, before the step.
        checks: (step, held-out loss), the start first.
        stopped_by: what ended the training early; None where it came to its end.
    """

    base: str
    steps: int
    kept_step: int
    has_gained: bool
    num_trained: int
    num_train: int
    num_held_out: int
    num_without_answer: int
    num_too_long: int
    num_refused: int
    losses: tuple[float, ...]
    checks: tuple[tuple[int, float], ...]
    stopped_by: str | None

    @staticmethod
    def of(
        state: "TrainingState",
        settings: "FinetuneSettings",
        examples: "Examples",
        *,
        base: str,
        num_trained: int,
        stopped_by: "NonFiniteError | None",
    ) -> "FinetuneReport":
        """From a training that has come to its end."""
        held_out = settings.num_held_out(len(examples))
        best = min(state.checks, key=lambda check: check.held_out_loss)
        return FinetuneReport(
            base=base,
            steps=state.step,
            kept_step=best.step if state.best else state.checks[-1].step,
            has_gained=bool(state.best),
            num_trained=num_trained,
            num_train=len(examples) - held_out,
            num_held_out=held_out,
            num_without_answer=examples.num_without_answer,
            num_too_long=examples.num_too_long,
            num_refused=examples.num_refused,
            losses=tuple(_rounded(loss) for loss in state.losses),
            checks=tuple((check.step, _rounded(check.held_out_loss)) for check in state.checks),
            stopped_by=None if stopped_by is None else str(stopped_by),
        )

    @property
    def start_loss(self) -> float:
        """On the held-out examples, before the training."""
        return self.checks[0][1]

    @property
    def kept_loss(self) -> float:
        """On the held-out examples, of the adapter."""
        return dict(self.checks)[self.kept_step]

    @property
    def meaning(self) -> str:
        """In words."""
        what = f"held-out loss from {self.start_loss:.4g} to {self.kept_loss:.4g}"
        kept = f"the adapter is that of step {self.kept_step} of {self.steps}"
        if not self.has_gained:
            return f"{what}: no gain, {kept}. Fewer steps or a lower learning rate may help"
        return f"{what}, {kept}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the words."""
        return asdict(self) | {"meaning": self.meaning}

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "FinetuneReport":
        """Undo `to_json`."""
        fields = {key: stored[key] for key in FinetuneReport.__dataclass_fields__}
        checks = tuple((step, loss) for step, loss in fields.pop("checks"))
        return FinetuneReport(losses=tuple(fields.pop("losses")), checks=checks, **fields)


def write_finetune_report(report: FinetuneReport, recipe: dict[str, Any], folder: Path) -> None:
    """Write page, picture and README into `folder`."""
    (folder / "report").mkdir(exist_ok=True)
    content = report.to_json()
    light, dark = (png(draw_losses, content, theme) for theme in (LIGHT, DARK))
    picture = {"light": data_url(light), "dark": data_url(dark)}
    page = render("finetune.html.j2", f=report, recipe=recipe, picture=picture)
    readme = markdown_template("adapter.md.j2").render(f=report, recipe=recipe)
    replace_file(folder / "report" / "loss.png", lambda path: path.write_bytes(light))
    replace_file(folder / "report" / "index.html", lambda path: path.write_text(page, encoding="utf-8"))
    replace_file(folder / "README.md", lambda path: path.write_text(readme, encoding="utf-8"))


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
