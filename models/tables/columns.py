"""Columns that many tables have."""

from typing import Any

from sqlalchemy import Column, DateTime, text

NOW = text("now()")


def moment(nullable: bool = True, default: bool = False) -> Any:
    """A point in time; with `default`, the time of the transaction."""
    return Column(DateTime(timezone=True), nullable=nullable, server_default=NOW if default else None)
