"""The migrations make the schema that the tables describe, and run twice without harm."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine
from sqlmodel import SQLModel

import models.tables  # noqa: F401  (fills the metadata)
from store.engine import migrate, sqlalchemy_url


def is_comparable(_object: object, name: str | None, kind: str, reflected: bool, _other: object) -> bool:
    """Not so: partitions, which come and go with the days, and an index over an expression, which Alembic cannot compare
    (tests/integration/test_store_admission.py shows what it forbids)."""
    if kind == "index":
        return name != "executions_open"
    return not (kind == "table" and reflected and (name or "").startswith(("heartbeats_", "shadow_history_")))


def test_the_migrated_schema_is_the_one_that_the_tables_describe(database_url: str) -> None:
    engine = create_engine(sqlalchemy_url(database_url))
    with engine.connect() as connection:
        assert (
            compare_metadata(
                MigrationContext.configure(connection, opts={"include_object": is_comparable}), SQLModel.metadata
            )
            == []
        )
    engine.dispose()


def test_migrating_a_migrated_database_changes_nothing(empty_database: str) -> None:
    migrate(empty_database)
    test_the_migrated_schema_is_the_one_that_the_tables_describe(empty_database)
