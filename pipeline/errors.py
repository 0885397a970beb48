"""Everything that can go wrong in the pipeline for a reason that the user can mend.

The command line prints such an error as one paragraph and exits with 1; any other exception is a
bug and keeps its traceback. The message says what was wrong, what was expected, and what to do.
"""


class PipelineError(Exception):
    """Root of the errors below."""


class ModelError(PipelineError, ValueError):
    """The model cannot be opened: unknown, incomplete, damaged, or in an unsafe format."""


class NonFiniteError(PipelineError, ValueError):
    """A NaN or an infinity in a weight, an activation or a gradient; names the tensor."""


class CalibrationError(PipelineError, ValueError):
    """The calibration or evaluation text cannot be used."""


class BudgetError(PipelineError, ValueError):
    """The budget is malformed, or no plan fits it; names the smallest feasible one."""


class RecipeError(PipelineError, ValueError):
    """A setting is unknown or out of range."""


class RecipeChangedError(PipelineError, ValueError):
    """An unfinished run in the same place was started with another recipe; names the field."""


class OutputExistsError(PipelineError, FileExistsError):
    """The output folder holds something that this run must not overwrite."""


class DiskSpaceError(PipelineError, OSError):
    """The disk cannot hold what the run would write; found before the work starts."""


class MemoryShortError(PipelineError, MemoryError):
    """A stage would take more memory than there is, found before the work starts; or it ran out of it."""


class WorkerError(PipelineError, RuntimeError):
    """A worker process died."""


class WorkerSetupError(PipelineError, RuntimeError):
    """A worker on another machine has another version of the package, or cannot reach what it needs."""


class CheckpointError(PipelineError, ValueError):
    """A written checkpoint does not hold what the plan promised, or cannot be read."""


class GateError(PipelineError, ValueError):
    """A version does not reach what an alias requires, or the requirement is malformed; names the figures."""
