"""Everything that decides the result of a run, in one immutable, hashable object.

The same recipe with the same code on the same kind of machine gives the same bytes. A preset (presets/*.toml) gives the
settings that decide quality and time; flags of the command line override single ones. Unknown fields are errors.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.budget import Budget
from pipeline.errors import RecipeChangedError, RecipeError
from pipeline.recovery_settings import Kind

LEFT = "none"  # in the place of a quantizer: what it would be for stays as it is
PRESETS: dict[str, dict[str, Any]] = {
    path.stem: tomllib.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "presets").glob("*.toml"))
}


class Recipe(BaseModel):
    """See the fields; `Recipe.of` gives readable errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="folder, Hub id, GGUF file, or `demo`")
    revision: str | None = Field(None, description="commit, tag or branch on the Hub")
    trust_remote_code: bool = Field(False, description="run the code that comes with the model, see own_code.py")
    budget: str = Field(description="2.75bpw, 180MB, 4.2GiB or 40%")
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        description="of low-rank parts on offer, beside none; 0 for none"
    )
    factor_bits: tuple[Literal[16, 8, 6, 4, 3], ...] = Field(
        min_length=1, description="bits of a number of a low-rank part, each with each rank"
    )
    dataset: str | None = Field(None, description="calibration text; None for the bundled one")
    dataset_revision: str | None = Field(None, description="commit of a dataset on the Hub")
    num_samples: int = Field(ge=1, description="calibration windows for statistics")
    seq_len: int = Field(512, ge=2, description="tokens of a window")
    seed: int = Field(0, ge=0, lt=2**42, description="of every random draw")
    sensitivity: Literal["kronecker", "sequence", "guided", "kl", "input", "fisher", "factored", "none"] = Field(
        description="metric of the error, see pipeline/curvature_sums.py; `none` needs no text"
    )
    candidates: tuple[str, ...] = Field(min_length=1, description="quantizers on offer")
    overrides: tuple[tuple[str, str], ...] = Field((), description="(regular expression, quantizer) pairs")
    embeddings: str | None = Field(
        None,
        description="quantizer of token embeddings and of an untied output head; `none` leaves them as they are; None "
        "does so too, but of a budget in bytes lets the program choose",
    )
    share_groups: bool = Field(False, description="matrices that read the same input get the same choice")
    solver: Literal["highs", "cbc"] = Field("highs", description="of the integer program")
    cost_rows: int = Field(ge=1, description="rows of a matrix that the cost table samples")
    recover: bool = Field(description="train what is stored beside the codes until it answers like the original")
    recover_samples: int = Field(ge=2, description="windows of the calibration text to train on and to check with")
    recover_steps: int = Field(ge=1, description="of the optimizer, at most")
    recover_learning_rate: float = Field(
        1e-3, gt=0, allow_inf_nan=False, description="of AdamW, at its height; less where little is left"
    )
    recover_kl_weight: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="in its loss, of the divergence from the original"
    )
    recover_hidden_weight: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="of the relative error of what the head reads"
    )
    recover_ce_weight: float = Field(0.0, ge=0, allow_inf_nan=False, description="of the next token's cross-entropy")
    recover_train: tuple[Kind, ...] = Field(
        ("factors", "norms", "scales"), min_length=1, description="what is trained; `biases` too, where there are some"
    )
    eval_dataset: str | None = Field(None, description="evaluation text; None for the bundled one")
    eval_dataset_revision: str | None = Field(None, description="commit of a dataset on the Hub")
    eval_windows: int = Field(ge=0, description="windows to evaluate on; 0 to skip")
    eval_seq_len: int = Field(512, ge=2, description="tokens of an evaluation window")

    @field_validator("budget")
    @classmethod
    def _budget_is_well_formed(cls, text: str) -> str:
        Budget.parse(text)
        return text

    @staticmethod
    def of(preset: str = "default", **settings: Any) -> "Recipe":
        """A preset with the settings that are not None on top.

        Raises:
            RecipeError: names every setting that is unknown or out of range.
            BudgetError: the budget is malformed.
        """
        if not isinstance(preset, str) or preset not in PRESETS:
            raise RecipeError(f"There is no preset {preset!r}; choose one of {', '.join(sorted(PRESETS))}.")
        given = PRESETS[preset] | {key: value for key, value in settings.items() if value is not None}
        if isinstance(given.get("budget"), str):
            Budget.parse(given["budget"])
        try:
            return Recipe(**given)
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                + (f" (got {fault.get('input')!r})" if fault["type"] != "missing" else "")
                for fault in error.errors()
            ]
            raise RecipeError(
                f"The recipe has {len(faults)} wrong setting{'s' * (len(faults) > 1)}: {'; '.join(faults)}. "
                "`bitsmith compress --help` lists the settings."
            ) from None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return self.model_dump(mode="json")

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "Recipe":
        """Undo `to_json`."""
        return Recipe.of(**stored)


def check_trainable(recipe: Recipe) -> None:
    """Raise RecipeError if recovery would train for nothing, or factors alone and no plan can have any."""
    if recipe.recover and not (recipe.recover_kl_weight or recipe.recover_hidden_weight or recipe.recover_ce_weight):
        raise RecipeError(
            "All three weights of recovery's loss are 0, so there is nothing to train for. Give --recover-kl-weight, "
            "--recover-hidden-weight or --recover-ce-weight above 0."
        )
    if recipe.recover and not any(recipe.ranks) and recipe.recover_train == ("factors",):
        raise RecipeError(
            "Recovery is to train factors alone, and with rank 0 there are none. Train `norms` and `scales` too "
            "(--recover-train), or give a --rank above 0."
        )


def default_of(setting: str) -> Any:
    """What a recipe of before the setting existed stood for, as in its JSON; None of what is no setting."""
    field = Recipe.model_fields.get(setting)
    default = None if field is None or field.is_required() else field.get_default()
    return list(default) if isinstance(default, tuple) else default


def refuse_changes(before: dict[str, Any], now: dict[str, Any], where: str, advice: str) -> None:
    """Raise RecipeChangedError naming the fields in which two recipes differ, if any."""
    changed = [
        f"{field} was {was!r} and is now {now.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if (was := before.get(field, default_of(field))) != now.get(field)
    ]
    if changed:
        raise RecipeChangedError(f"{where} was made with another recipe: {'; '.join(changed)}. {advice}")
