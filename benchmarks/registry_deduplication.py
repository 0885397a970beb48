"""What several versions of a registry take together, beside what each would take alone.

    bitsmith compress demo --budget 2.5bpw,3bpw,3.5bpw,4bpw,4.5bpw --preset fast -o swept
    python -m benchmarks.registry_deduplication swept

reads the registry of BITSMITH_HOME. "alone" is the sum of the bytes of all files of a version, so that a file that five
versions share counts five times; "stored" counts every blob once.
"""

import argparse
from collections.abc import Iterable

from pipeline.console import open_registry
from registry import Artifact, Registry, Version


def alone_and_stored(versions: Iterable[Iterable[Artifact]]) -> tuple[int, int]:
    """Bytes of all files of all versions, and of their blobs; each version by its artifacts."""
    alone_bytes, blobs = 0, {}
    for artifacts in versions:
        mine = {entry.sha256: entry.size_bytes for artifact in artifacts for entry in artifact.files.values()}
        alone_bytes += sum(mine.values())
        blobs |= mine
    return alone_bytes, sum(blobs.values())


def parts(registry: Registry, version: Version) -> dict[str, list[Artifact]]:
    """The artifacts of a version: itself, its report, and all that it was made from, where the files are here."""
    ancestors = [
        artifact for artifact in registry.lineage(version.digest).artifacts if artifact.digest != version.digest
    ]
    report = [registry.get(version.report_digest)] if version.report_digest else []
    here = [each for each in ancestors if all(registry.store.has(entry) for entry in each.files.values())]
    made_from: dict[str, list[Artifact]] = {}
    for artifact in here:
        made_from.setdefault(artifact.kind, []).append(artifact)
    return {"checkpoint": [registry.get(version.digest)], "report": report} | made_from


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", help="what the names of the versions start with")
    asked = parser.parse_args()
    registry = open_registry()
    versions = [version for version in registry.versions() if version.name.startswith(asked.prefix)]
    found = [parts(registry, version) for version in versions]
    rows = [
        (kind, [each.get(kind, []) for each in found])
        for kind in dict.fromkeys(kind for each in found for kind in each)
    ]
    rows.append(("all", [[artifact for some in each.values() for artifact in some] for each in found]))
    print(f"{', '.join(map(str, versions))}, bytes:")
    print(f"{'':12} {'alone':>15} {'stored':>15} {'alone / stored':>15}")
    for kind, artifacts in rows:
        alone_bytes, stored_bytes = alone_and_stored(artifacts)
        print(f"{kind:12} {alone_bytes:15,} {stored_bytes:15,} {alone_bytes / stored_bytes:15.2f}")
    on_disk = sum(blob.stat().st_size for blob in registry.store.blobs())
    print(f"{'blobs/':12} {'':15} {on_disk:15,}")


if __name__ == "__main__":
    main()
