"""What can go wrong with deployments and their runs for a reason that the user can mend; see pipeline/errors.py."""

from pipeline.errors import PipelineError


class DeployError(PipelineError, ValueError):
    """A deployment cannot be made as it is written, or there is no server for it.

    Nothing was changed, or the message says what was.
    """


class OtherVersionError(PipelineError, RuntimeError):
    """The worker has another version of the package than the deployment was made with."""
