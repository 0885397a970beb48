"""SQLite's INSERT OR REPLACE deletes without a word to a trigger on DELETE: it is refused for alias_moves too."""

from alembic import op

revision = "0003"
down_revision = "0002"

SQLITE_TRIGGER = """
CREATE TRIGGER alias_moves_no_REPLACE BEFORE INSERT ON alias_moves
WHEN EXISTS (SELECT 1 FROM alias_moves WHERE name = NEW.name AND number = NEW.number)
BEGIN SELECT RAISE(ABORT, 'alias_moves is append-only'); END
"""


def upgrade() -> None:
    """PostgreSQL has no such statement; its ON CONFLICT DO UPDATE meets the trigger on UPDATE."""
    if op.get_bind().dialect.name == "sqlite":
        op.execute(SQLITE_TRIGGER)
