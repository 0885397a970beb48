"""Artifacts, steps, models and versions, as the first releases had them."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "artifacts",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("description", sa.String, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
    )
    op.create_table(
        "artifact_parents",
        sa.Column("digest", sa.String(64), sa.ForeignKey("artifacts.digest"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("parent", sa.String(64), nullable=False),
    )
    op.create_index("ix_artifact_parents_parent", "artifact_parents", ["parent"])
    op.create_table(
        "step_results",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("digest", sa.String(64), sa.ForeignKey("artifacts.digest"), nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
    )
    op.create_table(
        "models",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("created_at", sa.String, nullable=False),
    )
    op.create_table(
        "versions",
        sa.Column("name", sa.String(96), sa.ForeignKey("models.name"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(64), sa.ForeignKey("artifacts.digest"), nullable=False),
        sa.Column("report_digest", sa.String(64), sa.ForeignKey("artifacts.digest")),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("note", sa.String, nullable=False),
        sa.UniqueConstraint("name", "digest"),
    )
