"""What a Hub keeps of a repository: files, commits, branches and tags, with its rules."""

import fnmatch
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

LFS_FROM_BYTES = 1000
Files = dict[str, "StoredFile"]


@dataclass
class StoredFile:
    """Bytes and what the server claims about them; the two differ only after `HubServer.corrupt`."""

    content: bytes
    is_lfs: bool

    def __post_init__(self) -> None:
        self.size = len(self.content)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.git_oid = hashlib.sha1(b"blob %d\0" % self.size + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Repo:
    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        name = self.branches.get(revision) or self.tags.get(revision) or revision
        return name if name in self.commits else None

    def commit(self, files: Files, summary: str, branch: str = "main") -> str:
        parent = self.branches.get(branch, "")
        listing = json.dumps([[path, file.etag] for path, file in sorted(files.items())])
        oid = hashlib.sha1(f"{parent}{summary}{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[oid], self.parents[oid], self.titles[oid] = files, parent, summary
        self.branches[branch] = oid
        return oid

    def history(self, commit: str) -> Iterator[str]:
        """The commit and those before it, the newest first."""
        while commit:
            yield commit
            commit = self.parents[commit]

    def ignores(self, commit: str, path: str) -> bool:
        """Does a .gitignore there name the file?"""
        rules = self.commits[commit].get(".gitignore")
        lines = rules.content.decode().split() if rules else []
        return any(fnmatch.fnmatch(path, line) for line in lines)
