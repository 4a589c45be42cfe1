"""Certificates, enrolment, configurations, commands, and what the access keepers and caches need."""

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
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Field, SQLModel

from models.tables.columns import moment


class CertificateAuthority(SQLModel, table=True):
    """A CA certificate that Tidegate has made. Its key is elsewhere (`key_reference`), never here."""

    __tablename__ = "authorities"
    __table_args__ = (
        CheckConstraint("kind IN ('device','claim','service')", name="authorities_kind_valid"),
        CheckConstraint("state IN ('active','trusted','retired')", name="authorities_state_valid"),
        Index("authorities_one_active", "kind", unique=True, postgresql_where=text("state = 'active'")),
    )

    authority_id: str = Field(sa_column=Column(Text, primary_key=True))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    name: str = Field(sa_column=Column(Text, nullable=False))
    certificate: str = Field(sa_column=Column(Text, nullable=False))
    key_reference: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    not_before: datetime = Field(sa_column=moment(False))
    not_after: datetime = Field(sa_column=moment(False))
    crl_number: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    created_by: str = Field(default="unknown", sa_column=Column(Text, nullable=False, server_default="unknown"))
    retired_at: datetime | None = Field(default=None, sa_column=moment())


class RevocationList(SQLModel, table=True):
    """A signed CRL, as PEM."""

    __tablename__ = "crls"

    authority_id: str = Field(sa_column=Column(Text, primary_key=True))
    number: int = Field(sa_column=Column(BigInteger, primary_key=True))
    pem: str = Field(sa_column=Column(Text, nullable=False))
    revoked: int = Field(sa_column=Column(Integer, nullable=False))
    this_update: datetime = Field(sa_column=moment(False))
    next_update: datetime = Field(sa_column=moment(False))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))


class DeviceCertificate(SQLModel, table=True):
    """A device certificate. One for each device and generation, and no key twice: the constraints decide."""

    __tablename__ = "certificates"
    __table_args__ = (
        CheckConstraint("state IN ('valid','revoked')", name="certificates_state_valid"),
        Index("certificates_one_per_generation", "device_id", "generation", unique=True),
        Index("certificates_one_per_key", "spki_sha256", unique=True),
        Index("certificates_serial", "authority_id", "serial_hex", unique=True),
        Index("certificates_ending", "not_after", postgresql_where=text("state = 'valid'")),
    )

    certificate_id: str = Field(sa_column=Column(Text, primary_key=True))
    device_id: str = Field(sa_column=Column(Text, nullable=False))
    authority_id: str = Field(sa_column=Column(Text, nullable=False))
    generation: int = Field(sa_column=Column(Integer, nullable=False))
    serial_hex: str = Field(sa_column=Column(Text, nullable=False))
    spki_sha256: str = Field(sa_column=Column(Text, nullable=False))
    pem: str = Field(sa_column=Column(Text, nullable=False))
    not_before: datetime = Field(sa_column=moment(False))
    not_after: datetime = Field(sa_column=moment(False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    issued_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    confirmed_at: datetime | None = Field(default=None, sa_column=moment())
    """When a connection proved that the device has this certificate and its key."""
    revoked_at: datetime | None = Field(default=None, sa_column=moment())
    revocation_reason: str | None = Field(default=None, sa_column=Column(Text))


class ClaimBatch(SQLModel, table=True):
    """Devices that may enrol with one claim certificate: how many, which, until when, and what they become."""

    __tablename__ = "claim_batches"
    __table_args__ = (
        CheckConstraint("approval IN ('none','manual')", name="claim_batches_approval_valid"),
        CheckConstraint("enrolled >= 0 AND enrolled <= max_devices", name="claim_batches_not_exceeded"),
    )

    name: str = Field(sa_column=Column(Text, primary_key=True))
    device_type: str = Field(sa_column=Column(Text, nullable=False))
    site_id: str = Field(sa_column=Column(Text, nullable=False))
    zone: str | None = Field(default=None, sa_column=Column(Text))
    manufacturer: str | None = Field(default=None, sa_column=Column(Text))
    tags: dict[str, str] = Field(default_factory=dict, sa_column=Column(JSONB, nullable=False, server_default="{}"))
    config: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSONB, nullable=False, server_default="{}"))
    id_prefix: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    approval: str = Field(default="none", sa_column=Column(Text, nullable=False, server_default="none"))
    listed_only: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default="false"))
    max_devices: int = Field(sa_column=Column(Integer, nullable=False))
    enrolled: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    alarm_per_minute: int | None = Field(default=None, sa_column=Column(Integer))
    claim_certificate: str = Field(sa_column=Column(Text, nullable=False))
    claim_certificate_id: str = Field(sa_column=Column(Text, nullable=False, unique=True))
    expires_at: datetime = Field(sa_column=moment(False))
    disabled_at: datetime | None = Field(default=None, sa_column=moment())
    disabled_reason: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    created_by: str = Field(default="unknown", sa_column=Column(Text, nullable=False, server_default="unknown"))


class ClaimSerial(SQLModel, table=True):
    """A serial number on a batch's allow-list."""

    __tablename__ = "claim_serials"

    serial_number: str = Field(sa_column=Column(Text, primary_key=True))
    batch: str = Field(sa_column=Column(Text, nullable=False, index=True))


class Enrolment(SQLModel, table=True):
    """A request for a first certificate: one serial number, one key. At most one of a serial number is live."""

    __tablename__ = "enrolments"
    __table_args__ = (
        CheckConstraint(
            "state IN ('requested','waiting','issued','active','refused','failed','conflict','closed')",
            name="enrolments_state_valid",
        ),
        Index(
            "enrolments_one_live",
            "serial_number",
            unique=True,
            postgresql_where=text("state IN ('requested','waiting','issued','active')"),
        ),
        Index("enrolments_of_key", "serial_number", "spki_sha256"),
        Index("enrolments_recent", "batch", "requested_at"),
    )

    enrolment_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    serial_number: str = Field(sa_column=Column(Text, nullable=False))
    spki_sha256: str = Field(sa_column=Column(Text, nullable=False))
    public_key: str = Field(sa_column=Column(Text, nullable=False))
    batch: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    counted: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default="false"))
    """Whether it has taken one of the batch's places."""
    device_id: str | None = Field(default=None, sa_column=Column(Text))
    certificate_id: str | None = Field(default=None, sa_column=Column(Text))
    reason: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    source: str | None = Field(default=None, sa_column=Column(Text))
    requested_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    decided_at: datetime | None = Field(default=None, sa_column=moment())
    decided_by: str | None = Field(default=None, sa_column=Column(Text))


class DeviceConfiguration(SQLModel, table=True):
    """A version of a device's configuration: what was wanted, by whom, and when the device said that it runs it."""

    __tablename__ = "device_configurations"

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    version: int = Field(sa_column=Column(Integer, primary_key=True))
    config: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    actor: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    acknowledged_at: datetime | None = Field(default=None, sa_column=moment())


class DeviceCommand(SQLModel, table=True):
    """Something a device is told to do with its identity; signed for it when it asks."""

    __tablename__ = "device_commands"
    __table_args__ = (
        CheckConstraint(
            "state IN ('pending','accepted','succeeded','failed','expired','canceled')",
            name="device_commands_state_valid",
        ),
        Index(
            "device_commands_one_open",
            "device_id",
            "operation",
            unique=True,
            postgresql_where=text("state IN ('pending','accepted')"),
        ),
    )

    request_id: str = Field(sa_column=Column(Text, primary_key=True))
    device_id: str = Field(sa_column=Column(Text, nullable=False))
    operation: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    requested_by: str = Field(sa_column=Column(Text, nullable=False))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    expires_at: datetime = Field(sa_column=moment(False))
    answered_at: datetime | None = Field(default=None, sa_column=moment())
    answer: str | None = Field(default=None, sa_column=Column(Text))


class DeviceWait(SQLModel, table=True):
    """A workflow that waits for something a device does; removed when it has happened (store/waits.py)."""

    __tablename__ = "device_waits"

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    event: str = Field(sa_column=Column(Text, primary_key=True))
    workflow_id: str = Field(sa_column=Column(Text, primary_key=True))
    at_least: int | None = Field(default=None, sa_column=Column(Integer))
    """For configurations: the version from which on the wait is over."""
    since: datetime | None = Field(default=None, sa_column=moment(False, True))


class OutboxSignal(SQLModel, table=True):
    """A signal to a workflow, written in the transaction that gives cause for it; a worker delivers it."""

    __tablename__ = "workflow_outbox"

    outbox_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    workflow_id: str = Field(sa_column=Column(Text, nullable=False))
    event: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    attempts: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))


class Tombstone(SQLModel, table=True):
    """A retired serial number: it cannot be enrolled again until somebody releases it."""

    __tablename__ = "tombstones"
    __table_args__ = (
        Index("tombstones_standing", "serial_number", unique=True, postgresql_where=text("released_at IS NULL")),
    )

    tombstone_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    serial_number: str = Field(sa_column=Column(Text, nullable=False))
    device_id: str = Field(sa_column=Column(Text, nullable=False))
    retired_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    retired_by: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    released_at: datetime | None = Field(default=None, sa_column=moment())
    released_by: str | None = Field(default=None, sa_column=Column(Text))


class AccessState(SQLModel, table=True):
    """One row: a number that grows with every change of who may speak. Brokers are brought to it (`access/`)."""

    __tablename__ = "access_state"
    __table_args__ = (CheckConstraint("one_row", name="access_state_one_row"),)

    one_row: bool = Field(default=True, sa_column=Column(Boolean, primary_key=True, server_default="true"))
    revision: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    changed_at: datetime | None = Field(default=None, sa_column=moment(False, True))


class BrokerState(SQLModel, table=True):
    """A broker and the revision of access that it enforces."""

    __tablename__ = "brokers"

    broker_id: str = Field(sa_column=Column(Text, primary_key=True))
    applied_revision: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    applied_at: datetime | None = Field(default=None, sa_column=moment())
    crl_next_update: datetime | None = Field(default=None, sa_column=moment())
    seen_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    error: str | None = Field(default=None, sa_column=Column(Text))


class AuditEvent(SQLModel, table=True):
    """Who or what did what to an identity, when and why. Append-only: a trigger refuses changes."""

    __tablename__ = "audit_events"
    __table_args__ = (
        Index("audit_events_subject", "subject_kind", "subject", "event_no"),
        Index("audit_events_at", "at"),
    )

    event_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    at: datetime | None = Field(default=None, sa_column=moment(False, True))
    actor: str = Field(sa_column=Column(Text, nullable=False))
    action: str = Field(sa_column=Column(Text, nullable=False))
    subject_kind: str = Field(sa_column=Column(Text, nullable=False))
    subject: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    details: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSONB, nullable=False, server_default="{}"))


class LookupCache(SQLModel, table=True):
    """A cache of devices that wants to hear of changes; without one, the trigger on `devices` writes nothing."""

    __tablename__ = "lookup_caches"

    cache_id: str = Field(sa_column=Column(Text, primary_key=True))
    seen_at: datetime | None = Field(default=None, sa_column=moment(False, True))


class CacheInvalidation(SQLModel, table=True):
    """A device whose cached entry is out of date; written by the trigger, removed once the cache has forgotten it."""

    __tablename__ = "cache_invalidations"

    invalidation_no: int | None = Field(
        default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True)
    )
    device_id: str = Field(sa_column=Column(Text, nullable=False))
    serial_number: str = Field(sa_column=Column(Text, nullable=False))
