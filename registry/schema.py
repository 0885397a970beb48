"""The tables of the index. `migrations/versions` brings an older database to them, step by step.

artifacts           one row a result, whole as canonical JSON
artifact_parents    what it was made from, in order
step_results        step key -> the artifact that it made
models, versions    names, and the numbers given out under them; rows are never changed
aliases             name@alias -> version, movable
alias_moves         who moved which alias when, from where to where and why; the database refuses to change a row
"""

from sqlalchemy import (
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

REVISIONS = ("0001", "0002", "0003")  # of migrations/versions, oldest first

metadata = MetaData()
artifacts = Table(
    "artifacts",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("kind", String, nullable=False),
    Column("description", String, nullable=False),  # the artifact's canonical JSON
    Column("created_at", String, nullable=False),
    Column("used_at", String, nullable=False),  # last made, found or published: what `gc` goes by
)
# A parent may be unknown here: a pulled version names parents that stayed on another machine.
artifact_parents = Table(
    "artifact_parents",
    metadata,
    Column("digest", ForeignKey("artifacts.digest"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("parent", String(64), nullable=False, index=True),
)
step_results = Table(
    "step_results",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("digest", ForeignKey("artifacts.digest"), nullable=False),
    Column("created_at", String, nullable=False),
)
models = Table(
    "models",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("created_at", String, nullable=False),
)
versions = Table(
    "versions",
    metadata,
    Column("name", ForeignKey("models.name"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("digest", ForeignKey("artifacts.digest"), nullable=False),
    Column("report_digest", ForeignKey("artifacts.digest")),
    Column("created_at", String, nullable=False),
    Column("note", String, nullable=False),
    UniqueConstraint("name", "digest"),
)
aliases = Table(
    "aliases",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("alias", String(96), primary_key=True),
    Column("version", Integer, nullable=False),
    ForeignKeyConstraint(["name", "version"], ["versions.name", "versions.version"]),
)
alias_moves = Table(
    "alias_moves",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("alias", String(96), nullable=False),
    Column("action", String, nullable=False),
    Column("from_version", Integer),
    Column("to_version", Integer),
    Column("moved_at", String, nullable=False),
    Column("moved_by", String, nullable=False),
    Column("reason", String, nullable=False),
)
