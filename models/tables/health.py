"""Heartbeats, what they give cause for, and how far the engine could have heard them."""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, JSONB
from sqlmodel import Field, SQLModel

from models.tables.columns import moment


class Alert(SQLModel, table=True):
    """Something a person has to look at: one row for each rule and subject until it is resolved."""

    __tablename__ = "alerts"
    __table_args__ = (
        CheckConstraint("state IN ('open','acknowledged','resolved')", name="alerts_state_valid"),
        Index("alerts_one_open", "rule", "subject", unique=True, postgresql_where=text("state <> 'resolved'")),
    )

    alert_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    rule: str = Field(sa_column=Column(Text, nullable=False))
    subject: str = Field(sa_column=Column(Text, nullable=False))
    text: str = Field(sa_column=Column(Text, nullable=False))
    severity: str = Field(default="warning", sa_column=Column(Text, nullable=False, server_default="warning"))
    state: str = Field(sa_column=Column(Text, nullable=False))
    occurrences: int = Field(default=1, sa_column=Column(Integer, nullable=False, server_default="1"))
    opened_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    last_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    acknowledged_at: datetime | None = Field(default=None, sa_column=moment())
    acknowledged_by: str | None = Field(default=None, sa_column=Column(Text))
    resolved_at: datetime | None = Field(default=None, sa_column=moment())
    resolved_by: str | None = Field(default=None, sa_column=Column(Text))


class HeartbeatRecord(SQLModel, table=True):
    """Every heartbeat that was acknowledged, in daily partitions; `at` is when it was committed.

    Without a primary key: its index would cost more at every heartbeat, and keep nothing out that can come in. The index
    by device alone is smaller, because equal keys are kept once (docs/health.md).
    """

    __tablename__ = "heartbeats"
    __table_args__ = (Index("heartbeats_of_device", "device_id"), {"postgresql_partition_by": "RANGE (at)"})
    __mapper_args__ = {"primary_key": ["device_id", "at", "beat_no"]}

    device_id: str = Field(sa_column=Column(Text, nullable=False))
    at: datetime = Field(sa_column=moment(False))
    beat_no: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    """Of those of one device in one batch."""
    device_time: datetime | None = Field(default=None, sa_column=moment())
    uptime: int | None = Field(default=None, sa_column=Column(BigInteger))
    free_memory: int | None = Field(default=None, sa_column=Column(BigInteger))
    cpu_temperature: float | None = Field(default=None, sa_column=Column(DOUBLE_PRECISION))
    firmware_version: str | None = Field(default=None, sa_column=Column(Text))
    signal_strength: float | None = Field(default=None, sa_column=Column(DOUBLE_PRECISION))
    error_count: int | None = Field(default=None, sa_column=Column(BigInteger))
    boot_id: str | None = Field(default=None, sa_column=Column(Text))
    extra: dict[str, float] | None = Field(default=None, sa_column=Column(JSONB))


class IngestState(SQLModel, table=True):
    """Since when the engine has heard without a gap: a message of its own goes through the broker every few seconds.

    A device is offline only when it has been silent since then; while nothing is heard, nobody is declared offline.
    """

    __tablename__ = "ingest_state"

    source: str = Field(sa_column=Column(Text, primary_key=True))
    covered_since: datetime = Field(sa_column=moment(False))
    pulsed_at: datetime = Field(sa_column=moment(False))


class DeviceType(SQLModel, table=True):
    """What holds for all devices of a type."""

    __tablename__ = "device_types"

    device_type: str = Field(sa_column=Column(Text, primary_key=True))
    offline_after_seconds: float | None = Field(default=None, sa_column=Column(DOUBLE_PRECISION))


class AlertRule(SQLModel, table=True):
    """When a heartbeat gives cause for an alert (models/alerting.py has the specification)."""

    __tablename__ = "alert_rules"

    name: str = Field(sa_column=Column(Text, primary_key=True))
    spec: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    enabled: bool = Field(default=True, sa_column=Column(Boolean, nullable=False, server_default="true"))
    revision: int = Field(default=1, sa_column=Column(Integer, nullable=False, server_default="1"))
    created_by: str = Field(default="unknown", sa_column=Column(Text, nullable=False, server_default="unknown"))
    updated_at: datetime | None = Field(default=None, sa_column=moment(False, True))


class AlertProgress(SQLModel, table=True):
    """How far a device is on the way into an alert, or out of it; no row where all is well."""

    __tablename__ = "alert_progress"
    __table_args__ = ({"postgresql_with": {"fillfactor": "70"}},)

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    rule: str = Field(sa_column=Column(Text, primary_key=True))
    firing: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default="false"))
    in_a_row: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    """Heartbeats in a row beyond the threshold; while firing, in a row back within the limit."""
    since: datetime | None = Field(default=None, sa_column=moment())


class AlertNotification(SQLModel, table=True):
    """A change of an alert that somebody has to be told of; a trigger on `alerts` writes it, a worker hands it over."""

    __tablename__ = "alert_notifications"
    __table_args__ = (
        Index("alert_notifications_waiting", "notification_no", postgresql_where=text("handed_over_at IS NULL")),
        Index("alert_notifications_told", "handed_over_at"),
        Index("alert_notifications_of_alert", "alert_no"),
    )

    notification_no: int | None = Field(
        default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True)
    )
    alert_no: int = Field(sa_column=Column(BigInteger, nullable=False))
    event: str = Field(sa_column=Column(Text, nullable=False))
    """The state that the alert has come to."""
    at: datetime | None = Field(default=None, sa_column=moment(False, True))
    handed_over_at: datetime | None = Field(default=None, sa_column=moment())
    digest: str | None = Field(default=None, sa_column=Column(Text))
    """The workflow that tells of it."""
