"""The texts of a run, cut into windows: for statistics, for recovery, and for evaluation."""

from dataclasses import dataclass
from functools import cache

from pipeline.calibration import TokenWindows, check_fits, token_windows
from pipeline.model import Model
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.recover import require_windows


@dataclass(frozen=True)
class Texts:
    """Token windows; None where the recipe has no use for them.

    Attributes:
        calibration: for statistics.
        recovery: for training and for its checks, from the same text.
        evaluation: of another text.
    """

    calibration: TokenWindows | None
    recovery: TokenWindows | None
    evaluation: TokenWindows | None

    @staticmethod
    def of(recipe: Recipe, model: Model, progress: Progress) -> "Texts":
        """Read and tokenize what the recipe needs.

        Raises:
            CalibrationError: a text cannot be read, is too short, or does not fit the vocabulary.
        """
        calibration = recovery = evaluation = None
        tokenizer = cache(model.tokenizer)  # without a text no model needs one
        vocab_size = model.config.get_text_config().vocab_size

        def from_calibration_text(num_windows: int) -> TokenWindows:
            windows = token_windows(
                recipe.dataset,
                tokenizer(),
                num_windows=num_windows,
                seq_len=recipe.seq_len,
                seed=recipe.seed,
                revision=recipe.dataset_revision,
                ends=model.task.ends(tokenizer()),
            )
            check_fits(windows, vocab_size, model.num_positions)
            if len(windows) < num_windows:
                progress.say(
                    f"The calibration text has {len(windows)} windows of {recipe.seq_len} tokens, fewer than the "
                    f"{num_windows} asked for; all of them are used."
                )
            return windows

        if recipe.sensitivity != "none":
            calibration = from_calibration_text(recipe.num_samples)
        if recipe.recover:
            recovery = from_calibration_text(recipe.recover_samples)
            require_windows(recovery.tokens)
        if recipe.eval_windows:
            evaluation = token_windows(
                recipe.eval_dataset,
                tokenizer(),
                num_windows=recipe.eval_windows,
                seq_len=recipe.eval_seq_len,
                seed=None,
                revision=recipe.eval_dataset_revision,
                split="test",
                default="evaluation",
                ends=model.task.ends(tokenizer()),
            )
            check_fits(evaluation, vocab_size, model.num_positions)
        return Texts(calibration, recovery, evaluation)
