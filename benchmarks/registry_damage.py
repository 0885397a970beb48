"""Drills of the registry: damage it in every way known; `doctor` must find it, and mend it or say what to do.

    python -m benchmarks.registry_damage [--databases sqlite postgresql]

For each damage, on both databases: `doctor` must name it, `doctor --repair` mends it or says what to do, the commands
that made the versions run again, and a last `doctor` must find nothing but what the table says is lost for good.
Then nothing else may have changed: versions, aliases, their log, lineage, bytes. Exits with 1 where that is not so.
"""

import argparse
import re
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.registry_damages import DAMAGES, Damage
from benchmarks.registry_drill import add_databases, databases_of, new_registry
from registry import AliasMove, Lineage, Registry, Version
from registry.doctor import Finding
from tests import postgresql


def make(registry: Registry) -> None:
    """Statistics, two versions made from them, and their reports; again: the same."""

    def build(workdir: Path) -> None:
        (workdir / "out").mkdir(exist_ok=True)
        (workdir / "out" / "file").write_bytes(b"statistics")

    statistics = registry.step("statistics", [], {"seed": 0}, build)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, 3):
            weights, report = Path(folder) / f"weights{number}", Path(folder) / f"report{number}"
            weights.mkdir()
            report.mkdir()
            (weights / "weights").write_bytes(b"weights %d" % number * 1000)
            (weights / "config").write_bytes(b"{}")
            (report / "report").write_bytes(b"report %d" % number)
            checkpoint = registry.add_artifact("checkpoint", weights, [statistics.digest])
            evaluation = registry.add_artifact("evaluation", report, [checkpoint.digest])
            registry.publish("model", checkpoint, evaluation, f"note {number}")


def make_named(registry: Registry) -> None:
    """`make`, and an alias that moves twice."""
    make(registry)
    for number in (1, 2):
        registry.alias(f"model:{number}", "production", reason=f"reason {number}")


def facts(registry: Registry) -> tuple[list[Version], dict[str, int], list[AliasMove], list[Lineage], list[bool]]:
    """All that a damage may not change."""
    versions = registry.versions()
    lineage = [registry.lineage(version.digest) for version in versions]
    sound = [registry.verify(str(version)).ok for version in versions]
    return versions, registry.aliases("model"), registry.alias_moves("model"), lineage, sound


@dataclass(frozen=True)
class Outcome:
    """What `doctor` said first, what it mended and what it left, and what it still said at the end."""

    found: list[Finding]
    repaired: list[Finding]
    left: list[Finding]
    lost: list[Finding]


def drill(registry: Registry, damage: Damage) -> Outcome:
    """Damage the registry, which `make_named` filled, and bring it back; AssertionError where the promise is broken."""
    root, before = registry.root, facts(registry)
    registry._uses.close()
    damage.change(registry)
    found = Registry.examine(root)
    assert any(re.search(damage.named, str(finding)) for finding in found), f"not named: {found}"
    mended = Registry.examine(root, repair=True)
    assert len(mended) >= len([finding for finding in found if not finding.is_repaired]), "named only without --repair"
    again = Registry(root)
    make(again)
    lost = Registry.examine(root)
    if damage.keeps_facts:
        assert facts(again) == before, "something else changed"
    else:
        versions = again.versions()
        assert [version.number for version in versions] == list(range(1, len(versions) + 1)), "a gap in the numbers"
        assert again.aliases("model") == before[1], "an alias names another version"
        kept = [version for version in before[0] if version in versions]
        assert len(kept) == len(before[0]) - len(lost), "more was lost than is named"
        assert all(again.verify(str(version)).ok for version in kept)
    if damage.lost is None:
        assert lost == [], f"found a second time: {lost}"
    else:
        assert all(re.search(damage.lost, str(finding)) for finding in lost), f"something else is lost: {lost}"
        assert lost, "what is lost is not named any more"
    repaired = [finding for finding in (*found, *mended) if finding.is_repaired]
    return Outcome(found, repaired, [finding for finding in mended if not finding.is_repaired], lost)


def drill_damages(databases: Iterable[str]) -> dict[str, tuple[int, int]]:
    """database -> damages, all named and mended or left with the way out, and versions that are lost for good."""
    counts = {}
    for database in databases:
        num_damages = num_lost = 0
        with postgresql.server() if database == "postgresql" else nullcontext(None) as socket_folder:
            for damage in DAMAGES:
                if damage.only_sqlite and database != "sqlite":
                    continue
                with new_registry(socket_folder) as (root, _):
                    make_named(Registry(root))
                    outcome = drill(Registry(root), damage)
                num_damages += 1
                num_lost += len(outcome.lost)
                print(
                    f"{database}: {damage.what}: {len(outcome.found)} found, {len(outcome.repaired)} repaired, "
                    f"{len(outcome.left)} left with the way out, {len(outcome.lost)} lost for good"
                    f"; found: {', '.join(finding.what for finding in outcome.found)}",
                    flush=True,
                )
        counts[database] = num_damages, num_lost
    return counts


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_databases(parser)
    counts = drill_damages(databases_of(parser.parse_args())).values()
    num_damages, num_lost = (sum(each) for each in zip(*counts, strict=True))
    print(f"{num_damages} damages: all named, all mended or left with the way out; {num_lost} versions lost for good")


if __name__ == "__main__":
    main()
