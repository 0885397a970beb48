"""In the place of flows.child._serve: a child that is quick where another test has the real thing (`be_quick`)."""

from multiprocessing.connection import Connection

from flows.child import _serve
from tests.pipeline.small import be_quick


def serve(pipe: Connection, environment: dict[str, str]) -> None:
    """The child's life."""
    be_quick()
    _serve(pipe, environment)
