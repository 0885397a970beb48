"""Alembic's way in: runs the steps on the connection that `Database` hands over, inside its transaction."""

from alembic import context

from registry.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
