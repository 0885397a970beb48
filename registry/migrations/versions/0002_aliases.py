"""Movable aliases, the log of their moves, and when an artifact was last used."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

SQLITE_TRIGGER = """
CREATE TRIGGER alias_moves_no_{verb} BEFORE {verb} ON alias_moves
BEGIN SELECT RAISE(ABORT, 'alias_moves is append-only'); END
"""
POSTGRESQL_FUNCTION = """
CREATE FUNCTION alias_moves_refuse() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'alias_moves is append-only'; END $$
"""
POSTGRESQL_TRIGGER = """
CREATE TRIGGER alias_moves_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON alias_moves
FOR EACH STATEMENT EXECUTE FUNCTION alias_moves_refuse()
"""


def upgrade() -> None:
    """Add the tables, the column and the triggers; drop the table that held the number of the schema before Alembic."""
    op.add_column("artifacts", sa.Column("used_at", sa.String, nullable=False, server_default=""))
    op.execute("UPDATE artifacts SET used_at = created_at")
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("alias", sa.String(96), primary_key=True),
        sa.Column("version", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["name", "version"], ["versions.name", "versions.version"]),
    )
    op.create_table(
        "alias_moves",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("alias", sa.String(96), nullable=False),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("from_version", sa.Integer),
        sa.Column("to_version", sa.Integer),
        sa.Column("moved_at", sa.String, nullable=False),
        sa.Column("moved_by", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
    )
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(SQLITE_TRIGGER.format(verb=verb))
    else:
        op.execute(POSTGRESQL_FUNCTION)
        op.execute(POSTGRESQL_TRIGGER)
    op.execute("DROP TABLE IF EXISTS registry_schema")
