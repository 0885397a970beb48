"""Damages of all kinds: each is named, and repaired or refused with the way out, and nothing else changes."""

import pytest

from benchmarks.registry_damage import drill, make_named
from benchmarks.registry_damages import DAMAGES, Damage
from registry import Registry


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.what.replace(" ", "-"))
def test_damages_are_named_and_mended(damage: Damage, registry: Registry) -> None:
    if damage.only_sqlite and not registry._index.database.is_sqlite:
        pytest.skip("the index is no file")
    make_named(registry)
    drill(registry, damage)
