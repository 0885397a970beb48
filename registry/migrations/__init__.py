"""Steps from an older database to the tables of schema.py, run by Alembic."""
