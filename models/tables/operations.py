"""Shadows, diagnostics, and the failures of jobs' attempts."""

from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, BigInteger, CheckConstraint, Column, Index, Integer, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from models.tables.columns import moment


class Shadow(SQLModel, table=True):
    """A device's shadow document; the classic one has the empty name.

    A shadow that was deleted keeps its row, with `deleted_at`, so that its version goes on for a while.
    """

    __tablename__ = "shadows"
    __table_args__ = (
        Index("shadows_deleted", "deleted_at", postgresql_where=text("deleted_at IS NOT NULL")),
        {"postgresql_with": {"fillfactor": "70"}},
    )

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    name: str = Field(sa_column=Column(Text, primary_key=True))
    desired: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    reported: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    desired_metadata: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    reported_metadata: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    version: int = Field(sa_column=Column(BigInteger, nullable=False))
    recent: list[str] = Field(default_factory=list, sa_column=Column(ARRAY(Text), nullable=False, server_default="{}"))
    """Digests of the last updates of the device: one that a broker delivers again is known by it."""
    updated_at: datetime = Field(sa_column=moment(False))
    deleted_at: datetime | None = Field(default=None, sa_column=moment())


class ShadowChange(SQLModel, table=True):
    """What was accepted for a shadow, by whom: append-only, in daily partitions."""

    __tablename__ = "shadow_history"
    __table_args__ = ({"postgresql_partition_by": "RANGE (at)"},)

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    name: str = Field(sa_column=Column(Text, primary_key=True))
    version: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    at: datetime = Field(sa_column=Column(moment(False).type, primary_key=True))
    actor: str = Field(sa_column=Column(Text, nullable=False))
    change: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    """The `state` that was sent; none for a deletion."""


class Diagnostic(SQLModel, table=True):
    """A question to a device, and what it answered."""

    __tablename__ = "diagnostics"
    __table_args__ = (
        CheckConstraint(
            "state IN ('requested','answered','failed','timed-out','canceled')", name="diagnostics_state_valid"
        ),
        Index("diagnostics_of_device", "device_id", "created_at"),
        Index("diagnostics_of_job", "job_no", "device_id", postgresql_where=text("job_no IS NOT NULL")),
    )

    request_id: str = Field(sa_column=Column(Text, primary_key=True))
    device_id: str = Field(sa_column=Column(Text, nullable=False))
    type: str = Field(sa_column=Column(Text, nullable=False))
    parameters: dict[str, Any] = Field(
        default_factory=dict, sa_column=Column(JSONB, nullable=False, server_default="{}")
    )
    state: str = Field(sa_column=Column(Text, nullable=False))
    requested_by: str = Field(sa_column=Column(Text, nullable=False))
    job_no: int | None = Field(default=None, sa_column=Column(BigInteger))
    """The job whose execution this belongs to, with `execution_number`."""
    execution_number: int | None = Field(default=None, sa_column=Column(Integer))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    expires_at: datetime = Field(sa_column=moment(False))
    answered_at: datetime | None = Field(default=None, sa_column=moment())
    answer: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    error: str | None = Field(default=None, sa_column=Column(Text))


class ExecutionFailure(SQLModel, table=True):
    """An attempt of an execution that failed, was rejected or timed out: append-only."""

    __tablename__ = "execution_failures"
    __table_args__ = (Index("execution_failures_of_job", "job_no", "device_id"),)

    failure_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    job_no: int = Field(sa_column=Column(BigInteger, nullable=False))
    device_id: str = Field(sa_column=Column(Text, nullable=False))
    attempt: int = Field(sa_column=Column(Integer, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    failure_class: str | None = Field(default=None, sa_column=Column(Text))
    reason: str | None = Field(default=None, sa_column=Column(Text))
    details: dict[str, str] | None = Field(default=None, sa_column=Column(JSONB))
    started_at: datetime | None = Field(default=None, sa_column=moment())
    failed_at: datetime = Field(sa_column=moment(False))
    retry_at: datetime | None = Field(default=None, sa_column=moment())
    """When the next attempt may begin; none where this one was the last."""
