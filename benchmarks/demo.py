"""The demo model with the default recipe, its statistics collected once and kept in the registry."""

from pipeline.display import Bars
from pipeline.home import home
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import StageLog
from pipeline.statistics import Statistics
from registry import Registry


def demo_run(**settings: object) -> tuple[Run, Statistics]:
    """A prepared run and the statistics of its calibration text."""
    recipe = Recipe.of(model="demo", budget="3bpw", **settings)
    registry = Registry(home() / "registry")
    run = Run.prepare(recipe, registry, device="cpu", resume=True, log=StageLog(), progress=Bars())
    artifact = run.statistics()
    assert artifact is not None
    return run, Statistics.open(lambda name: registry.path(artifact, name))
