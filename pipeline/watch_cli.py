"""`bitsmith registry watch`."""

from typing import Annotated

import typer

from pipeline.console import open_registry, print_json
from pipeline.options import AsJson, Quiet
from registry import RegistryError


def watch(
    names: Annotated[list[str] | None, typer.Argument(help="NAME; all by default")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Ask the Hub whether base models have changed since the last version made from them; exits with 1 if it cannot."""
    from pipeline.display_registry import show_watched
    from pipeline.watch import watch as watch_bases

    found = watch_bases(open_registry(), names or ())
    if as_json:
        print_json([change.to_json() for change in found])
    elif not quiet:
        show_watched(found)
    if unknown := [change for change in found if change.state == "not asked"]:
        reasons = dict.fromkeys(str(change.problem) for change in unknown)
        raise RegistryError(
            f"{len(unknown)} of {len(found)} could not be asked: {', '.join(change.name for change in unknown)}. "
            + " ".join(reasons)
        )
