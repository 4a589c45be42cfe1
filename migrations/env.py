"""Alembic's entry: runs the migrations on the database that `store.engine.migrate` (or TIDEGATE_DATABASE_URL) names."""

import os

from alembic import context
from sqlalchemy import create_engine, pool
from sqlmodel import SQLModel

import models.tables  # noqa: F401  (fills the metadata)

PARTITIONED = ("heartbeats", "shadow_history")


def is_described(_object: object, name: str | None, kind: str, reflected: bool, _other: object) -> bool:
    """Whether a comparison with the tables is to look at this: partitions come and go with the days."""
    return not (kind == "table" and reflected and (name or "").startswith(tuple(f"{table}_" for table in PARTITIONED)))


url = context.config.attributes.get("url") or os.environ["TIDEGATE_DATABASE_URL"].replace(
    "postgresql://", "postgresql+psycopg://", 1
)

with create_engine(url, poolclass=pool.NullPool).connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        transaction_per_migration=True,
        include_object=is_described,
    )
    with context.begin_transaction():
        # Two processes that start at once migrate one after the other.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7311462)")
        context.run_migrations()
