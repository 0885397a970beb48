"""What a version is compared with on its run's page."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from registry import Registry
from registry.publication_record import record_publication


def _version(registry: Registry, folder: Path, content: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_text(content)
    return str(registry.publish("small", registry.add_artifact("checkpoint", folder)))


@pytest.mark.parametrize(("published", "beside"), [([], "small:2"), ([1], "small:1"), ([1, 2], "small:2")])
def test_a_version_stands_beside_the_last_one_that_was_published(
    published: list[int], beside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import artifacts

    from flows.summary import show_beside_last
    from pipeline.version_facts import VersionFacts

    registry, tables = Registry(tmp_path / "registry"), []
    names = [_version(registry, tmp_path / "folder", content) for content in ("one", "two", "three")]
    for number in published:
        digest = registry.version(f"small:{number}").digest
        record_publication(registry, digest, b"{}", repo_id="alice/small", revision=f"v{number}", commit="c" * 40)
    monkeypatch.setattr(VersionFacts, "of", lambda registry, version: SimpleNamespace(figures={"kld": version.number}))
    monkeypatch.setattr(artifacts, "create_table_artifact", lambda rows, key, description: tables.append(rows))
    for name in (names[0], names[2]):
        show_beside_last(registry, name)
    assert [[*rows[0]][1:] for rows in tables] == [["small:1"], [beside, "small:3"]]
