"""The migrations make the schema that the tables describe, and run twice without harm."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine
from sqlmodel import SQLModel

import models.tables  # noqa: F401  (fills the metadata)
from store.engine import migrate, sqlalchemy_url


def test_the_migrated_schema_is_the_one_that_the_tables_describe(database_url: str) -> None:
    engine = create_engine(sqlalchemy_url(database_url))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []
    engine.dispose()


def test_migrating_a_migrated_database_changes_nothing(empty_database: str) -> None:
    migrate(empty_database)
    test_the_migrated_schema_is_the_one_that_the_tables_describe(empty_database)
