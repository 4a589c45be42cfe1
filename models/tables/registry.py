"""The registry: devices, what they prove their identity with, and when each was last heard."""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, JSONB
from sqlmodel import Field, SQLModel

from models.tables.columns import moment


class Device(SQLModel, table=True):
    """The registry: one row per device."""

    __tablename__ = "devices"
    __table_args__ = (
        CheckConstraint(
            "status IN ('provisioning','configured','active','inactive','error','retired')", name="devices_status_valid"
        ),
        Index("devices_site", "site_id"),
        Index("devices_type", "device_type"),
        Index("devices_status", "status"),
        Index("devices_tags", "tags", postgresql_using="gin"),
        Index("devices_barred", "device_id", postgresql_where=text("barred_at IS NOT NULL")),
        {"postgresql_with": {"fillfactor": "80"}},
    )

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    device_type: str = Field(sa_column=Column(Text, nullable=False))
    serial_number: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    manufacturer: str | None = Field(default=None, sa_column=Column(Text))
    site_id: str = Field(sa_column=Column(Text, nullable=False))
    zone: str | None = Field(default=None, sa_column=Column(Text))
    tags: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSONB, nullable=False, server_default="{}"))
    status: str = Field(sa_column=Column(Text, nullable=False))
    firmware_version: str | None = Field(default=None, sa_column=Column(Text))
    firmware_sha256: str | None = Field(default=None, sa_column=Column(Text))
    config: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSONB, nullable=False, server_default="{}"))
    desired_config: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    config_version: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    """The version that the device runs, as it reported it; `desired_config_version` is the one it should run."""
    desired_config_version: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    config_document_version: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    """The version of the shadow document that carries both: grows with every accepted update of either side."""
    config_reported_at: datetime | None = Field(default=None, sa_column=moment())
    barred_at: datetime | None = Field(default=None, sa_column=moment())
    """Since when nothing that the device says is used: its identity is revoked, in doubt, or gone."""
    barred_reason: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    updated_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    retired_at: datetime | None = Field(default=None, sa_column=moment())


class DeviceCredential(SQLModel, table=True):
    """What a device proves its identity with."""

    __tablename__ = "device_credentials"

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    certificate_id: str | None = Field(default=None, sa_column=Column(Text))
    api_key_hash: str | None = Field(default=None, sa_column=Column(Text))
    last_rotation: datetime | None = Field(default=None, sa_column=moment())


class Presence(SQLModel, table=True):
    """The last heartbeat: narrow, no secondary index, room on the page, so that an update stays on it (HOT)."""

    __tablename__ = "presence"
    __table_args__ = ({"postgresql_with": {"fillfactor": "70"}},)

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    last_heartbeat: datetime = Field(sa_column=moment(False))
    device_time: datetime | None = Field(default=None, sa_column=moment())
    uptime: int | None = Field(default=None, sa_column=Column(BigInteger))
    free_memory: int | None = Field(default=None, sa_column=Column(BigInteger))
    cpu_temperature: float | None = Field(default=None, sa_column=Column(DOUBLE_PRECISION))
    firmware_version: str | None = Field(default=None, sa_column=Column(Text))
    signal_strength: float | None = Field(default=None, sa_column=Column(DOUBLE_PRECISION))
    error_count: int | None = Field(default=None, sa_column=Column(BigInteger))
    boot_id: str | None = Field(default=None, sa_column=Column(Text))
    former_boots: list[str] = Field(
        default_factory=list, sa_column=Column(ARRAY(Text), nullable=False, server_default="{}")
    )
    """Boot ids before this one, the newest first, and in `former_times` the last device time that each has named."""
    former_times: list[datetime] = Field(
        default_factory=list, sa_column=Column(ARRAY(DateTime(timezone=True)), nullable=False, server_default="{}")
    )
    boot_returns: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    """How often a former boot id has come back: a device that boots never repeats one, two devices with one key do."""
    boot_returned_at: datetime | None = Field(default=None, sa_column=moment())
    extra: dict[str, float] | None = Field(default=None, sa_column=Column(JSONB))
    offline_since: datetime | None = Field(default=None, sa_column=moment())
    """When it was found to be silent for too long; cleared once it is heard again (workflows/health.py)."""
