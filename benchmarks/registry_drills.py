"""All drills of the registry, one after the other; the last line is the sum.

    python -m benchmarks.registry_drills [--kills 200] [--processes 16] [--versions 50] [--databases sqlite postgresql]

Damages (registry_damage.py), full disks and read-only folders (registry_disk.py), kills of push and pull
(hub_drill.py), kills of everything else and many processes at once (registry_drill.py). Exits with 1, without that
line, where one of them finds anything lost, half there or unnamed.
"""

import argparse

from benchmarks.hub_drill import drill_hub_on
from benchmarks.registry_damage import drill_damages
from benchmarks.registry_disk import CannotMountError, drill_all
from benchmarks.registry_drill import add_databases, databases_of, drill_databases


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in each of the two parts")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--versions", type=int, default=50, help="each process")
    add_databases(parser)
    asked = parser.parse_args()
    databases = databases_of(asked)
    damages = drill_damages(databases)
    try:
        disks = f"{drill_all()} refusals on full and read-only disks, 0 half-written"
    except CannotMountError as error:
        print(f"disks left out: {error}", flush=True)
        disks = "disks left out"
    drill_hub_on(databases, asked.kills)
    acknowledged = drill_databases(
        databases, num_kills=asked.kills, num_processes=asked.processes, num_each=asked.versions
    )
    many = f"{2 * asked.kills} kills and {asked.processes} x {asked.versions} versions at once"
    sums = []
    for database in databases:
        num_damages, num_lost = damages[database]
        sums.append(
            f"{database}: {num_damages} damages all named, {num_lost} versions lost for good by them; {many}, "
            f"{acknowledged[database]} acknowledged, 0 lost, 0 half there"
        )
    print(". ".join([*sums, disks]))


if __name__ == "__main__":
    main()
