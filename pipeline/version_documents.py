"""plan.json, recipe.json and report.json of a version, read as from a stranger: a pull may hold anything."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from pipeline.budget import Budget
from pipeline.errors import CheckpointError, PipelineError
from registry import RegistryError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what a malformed document raises inside into a CheckpointError about `what`."""
    try:
        yield
    except (PipelineError, RegistryError):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise _malformed(what, error) from error
    except UndefinedError as error:  # of a template
        raise _malformed(what, error) from error


def read_document(path: Path, what: str) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    with reading(what):
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise TypeError(f"an object was expected, not {type(found).__name__}")
    return found


def read_plan(path: Path, what: str) -> dict[str, Any]:
    """plan.json with all that commands look at; `embeddings` is empty where it says none. Raises CheckpointError."""
    plan = read_document(path, what)
    with reading(what):
        _check(plan, "bits_per_param", float, int)
        _check(plan, "budget", str)
        _check(plan, "matrices", dict)
        plan.setdefault("embeddings", {})
        _check(plan, "embeddings", dict)
        for matrix in (*plan["matrices"].values(), *plan["embeddings"].values()):
            _check(matrix, "label", str)
            _check(matrix, "size_bits", int)
            _check(matrix, "shape", list)
            rows, columns = matrix["shape"]
            if not (isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0):
                raise TypeError(f"a shape is {matrix['shape']}")
    return plan


def read_recipe(path: Path, what: str) -> dict[str, Any]:
    """recipe.json with a model and a budget. Raises CheckpointError."""
    recipe = read_document(path, what)
    with reading(what):
        _check(recipe, "model", str)
        _check(recipe, "budget", str)
        Budget.parse(recipe["budget"])
    return recipe


def _check(content: dict[str, Any], key: str, *kinds: type) -> None:
    if isinstance(content[key], bool) or not isinstance(content[key], kinds):
        raise TypeError(f"{key!r} is {str(content[key])[:80]!r}")


def _malformed(what: str, error: Exception) -> CheckpointError:
    why = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{what} is not as bitsmith writes it ({why}). Another program made the version, or the file was changed "
        "before it was published. Choose another version, or compress the model again."
    )
