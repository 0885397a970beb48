"""A registry whose blobs lie at a URL."""

from pathlib import Path

from registry import Registry
from registry.remote import RemoteBlobs
from registry.settings import RegistrySettings


def registry_at(url: str, root: Path, database: str | None = None) -> Registry:
    """As `bitsmith registry init --store URL` makes it, in the folder `root`."""
    root.mkdir(parents=True, exist_ok=True)
    settings = RegistrySettings(database, url)
    settings.write(root)
    RemoteBlobs(url).claim(settings.index_name(root))
    return Registry(root)
