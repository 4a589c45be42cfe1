"""The PostgreSQL schema as SQLModel tables. Imported by store/ (and by migrations) alone.

Two sources of truth, never mixed: these tables hold what is true of each device and each execution; where a process
stands is Temporal's. Counters on `waves` and `jobs` change only in the transaction that changes executions, under the
lock of the job's row. Names of indexes and constraints are stable: migrations refer to them.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Index,
    Integer,
    SmallInteger,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import BYTEA, DOUBLE_PRECISION, JSONB
from sqlmodel import Field, SQLModel

NOW = text("now()")


def _time(nullable: bool = True, default: bool = False) -> Any:
    return Column(DateTime(timezone=True), nullable=nullable, server_default=NOW if default else None)


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
    config_reported_at: datetime | None = Field(default=None, sa_column=_time())
    barred_at: datetime | None = Field(default=None, sa_column=_time())
    """Since when nothing that the device says is used: its identity is revoked, in doubt, or gone."""
    barred_reason: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    updated_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    retired_at: datetime | None = Field(default=None, sa_column=_time())


class DeviceCredential(SQLModel, table=True):
    """What a device proves its identity with."""

    __tablename__ = "device_credentials"

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    certificate_id: str | None = Field(default=None, sa_column=Column(Text))
    api_key_hash: str | None = Field(default=None, sa_column=Column(Text))
    last_rotation: datetime | None = Field(default=None, sa_column=_time())


class Presence(SQLModel, table=True):
    """The last heartbeat: narrow, no secondary index, room on the page, so that an update stays on it (HOT)."""

    __tablename__ = "presence"
    __table_args__ = ({"postgresql_with": {"fillfactor": "70"}},)

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    last_heartbeat: datetime = Field(sa_column=_time(False))
    device_time: datetime | None = Field(default=None, sa_column=_time())
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
    boot_returned_at: datetime | None = Field(default=None, sa_column=_time())
    extra: dict[str, float] | None = Field(default=None, sa_column=Column(JSONB))


class Release(SQLModel, table=True):
    """A published release: the signed statement as it came, and what of it is queried."""

    __tablename__ = "releases"
    __table_args__ = (Index("releases_version", "product", "version", unique=True),)

    release_id: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    product: str = Field(sa_column=Column(Text, nullable=False))
    version: str = Field(sa_column=Column(Text, nullable=False))
    hardware: list[str] = Field(sa_column=Column(ARRAY(Text), nullable=False))
    security_counter: int = Field(sa_column=Column(BigInteger, nullable=False))
    sha256: str = Field(sa_column=Column(Text, nullable=False))
    size_bytes: int = Field(sa_column=Column(BigInteger, nullable=False))
    envelope: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    key_id: str = Field(sa_column=Column(Text, nullable=False))
    published_by: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))


class Delta(SQLModel, table=True):
    """A delta that was built, and verified by applying it; or the reason why there is none."""

    __tablename__ = "deltas"

    base_sha256: str = Field(sa_column=Column(Text, primary_key=True))
    target_sha256: str = Field(sa_column=Column(Text, primary_key=True))
    codec: str = Field(sa_column=Column(Text, primary_key=True))
    sha256: str | None = Field(default=None, sa_column=Column(Text))
    size_bytes: int | None = Field(default=None, sa_column=Column(BigInteger))
    failure: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))


class Job(SQLModel, table=True):
    """A rollout (later also a fleet job). Its row is the lock that every change of its executions takes."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("status IN ('planned','running','paused','halted','finished')", name="jobs_status_valid"),
        CheckConstraint("in_flight >= 0", name="jobs_in_flight_not_negative"),
        Index("jobs_job_id", "job_id", unique=True),
        Index("jobs_name", "kind", "name", unique=True),
        {"postgresql_with": {"fillfactor": "50"}},
    )

    job_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    job_id: str = Field(sa_column=Column(Text, nullable=False))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    name: str = Field(sa_column=Column(Text, nullable=False))
    operation: str = Field(sa_column=Column(Text, nullable=False))
    status: str = Field(sa_column=Column(Text, nullable=False))
    phase: str = Field(sa_column=Column(Text, nullable=False))
    outcome: str | None = Field(default=None, sa_column=Column(Text))
    reason: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    spec: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    document: dict[str, Any] | None = Field(default=None, sa_column=Column(JSONB))
    release_id: int | None = Field(default=None, sa_column=Column(BigInteger))
    target_version: str | None = Field(default=None, sa_column=Column(Text))
    target_sha256: str | None = Field(default=None, sa_column=Column(Text))
    requested_by: str = Field(default="unknown", sa_column=Column(Text, nullable=False, server_default="unknown"))
    devices: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    in_flight_cap: int = Field(sa_column=Column(Integer, nullable=False))
    per_minute: int | None = Field(default=None, sa_column=Column(Integer))
    in_flight: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    exposed: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    by_delta: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    admitted_seconds: list[int] = Field(
        default_factory=list, sa_column=Column(ARRAY(BigInteger), nullable=False, server_default="{}")
    )
    admitted_counts: list[int] = Field(
        default_factory=list, sa_column=Column(ARRAY(Integer), nullable=False, server_default="{}")
    )
    accept_seconds: float = Field(sa_column=Column(DOUBLE_PRECISION, nullable=False))
    download_seconds: float = Field(sa_column=Column(DOUBLE_PRECISION, nullable=False))
    install_seconds: float = Field(sa_column=Column(DOUBLE_PRECISION, nullable=False))
    confirm_seconds: float = Field(sa_column=Column(DOUBLE_PRECISION, nullable=False))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    started_at: datetime | None = Field(default=None, sa_column=_time())
    finished_at: datetime | None = Field(default=None, sa_column=_time())


class Wave(SQLModel, table=True):
    """A wave's counters and its breaker. `failure_weight`, `success_weight` and `halt_threshold` are domain.gate's."""

    __tablename__ = "waves"
    __table_args__ = (
        CheckConstraint("status IN ('pending','open','closed')", name="waves_status_valid"),
        CheckConstraint(
            "least(pending, queued, in_progress, succeeded, failed, timed_out, rejected, removed, canceled) >= 0",
            name="waves_counts_not_negative",
        ),
        {"postgresql_with": {"fillfactor": "50"}},
    )

    job_no: int = Field(sa_column=Column(BigInteger, primary_key=True))
    wave: int = Field(sa_column=Column(SmallInteger, primary_key=True))
    name: str = Field(sa_column=Column(Text, nullable=False))
    status: str = Field(sa_column=Column(Text, nullable=False))
    target_count: int = Field(sa_column=Column(Integer, nullable=False))
    completion_count: int = Field(sa_column=Column(Integer, nullable=False))
    pending: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    queued: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    in_progress: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    succeeded: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    failed: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    timed_out: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    rejected: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    removed: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    canceled: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    gate_succeeded: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    gate_failed: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    failure_weight: int = Field(sa_column=Column(BigInteger, nullable=False))
    success_weight: int = Field(sa_column=Column(BigInteger, nullable=False))
    halt_threshold: int = Field(sa_column=Column(BigInteger, nullable=False))
    tripped_at: datetime | None = Field(default=None, sa_column=_time())
    tripped_failed: int | None = Field(default=None, sa_column=Column(Integer))
    tripped_exposed: int | None = Field(default=None, sa_column=Column(Integer))
    notified_rank: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    opened_at: datetime | None = Field(default=None, sa_column=_time())
    answered_at: datetime | None = Field(default=None, sa_column=_time())
    closed_at: datetime | None = Field(default=None, sa_column=_time())
    verdict: str | None = Field(default=None, sa_column=Column(Text))
    reason: str | None = Field(default=None, sa_column=Column(Text))


class Execution(SQLModel, table=True):
    """One job on one device."""

    __tablename__ = "executions"
    __table_args__ = (
        CheckConstraint(
            "state IN ('PENDING','QUEUED','IN_PROGRESS','SUCCEEDED','FAILED','TIMED_OUT','REJECTED','REMOVED','CANCELED')",
            name="executions_state_valid",
        ),
        Index(
            "executions_one_firmware_update",
            "device_id",
            unique=True,
            postgresql_where=text("exclusive AND state IN ('PENDING','QUEUED','IN_PROGRESS')"),
        ),
        Index("executions_by_rank", "job_no", "wave", "rank", unique=True),
        {"postgresql_with": {"fillfactor": "60"}},
    )

    job_no: int = Field(sa_column=Column(BigInteger, primary_key=True))
    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    wave: int = Field(sa_column=Column(SmallInteger, nullable=False))
    rank: int = Field(sa_column=Column(Integer, nullable=False))
    exclusive: bool = Field(default=True, nullable=False)
    state: str = Field(sa_column=Column(Text, nullable=False))
    version_number: int = Field(default=1, sa_column=Column(Integer, nullable=False, server_default="1"))
    execution_number: int = Field(default=1, sa_column=Column(Integer, nullable=False, server_default="1"))
    step: str | None = Field(default=None, sa_column=Column(Text))
    status_details: dict[str, str] | None = Field(default=None, sa_column=Column(JSONB))
    failure_class: str | None = Field(default=None, sa_column=Column(Text))
    reason: str | None = Field(default=None, sa_column=Column(Text))
    base_version: str | None = Field(default=None, sa_column=Column(Text))
    base_sha256: str | None = Field(default=None, sa_column=Column(Text))
    by_delta: bool | None = Field(default=None)
    queued_at: datetime | None = Field(default=None, sa_column=_time())
    started_at: datetime | None = Field(default=None, sa_column=_time())
    updated_at: datetime | None = Field(default=None, sa_column=_time())
    finished_at: datetime | None = Field(default=None, sa_column=_time())
    deadline_at: datetime | None = Field(default=None, sa_column=_time())


class JobEvent(SQLModel, table=True):
    """What happened to a job, when, why and by whom: append-only."""

    __tablename__ = "job_events"
    __table_args__ = (Index("job_events_job", "job_no", "event_no"),)

    event_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    job_no: int = Field(sa_column=Column(BigInteger, nullable=False))
    at: datetime | None = Field(default=None, sa_column=_time(False, True))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    wave: int | None = Field(default=None, sa_column=Column(SmallInteger))
    actor: str = Field(default="tidegate", sa_column=Column(Text, nullable=False, server_default="tidegate"))
    text: str = Field(sa_column=Column(Text, nullable=False))


class QuarantinedMessage(SQLModel, table=True):
    """A message from a device that could not be used, as it came (the first 4 KiB of it)."""

    __tablename__ = "quarantine"

    message_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    at: datetime | None = Field(default=None, sa_column=_time(False, True))
    topic: str = Field(sa_column=Column(Text, nullable=False))
    thing: str | None = Field(default=None, sa_column=Column(Text))
    size_bytes: int = Field(sa_column=Column(Integer, nullable=False))
    payload: bytes = Field(sa_column=Column(BYTEA, nullable=False))
    code: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(sa_column=Column(Text, nullable=False))


# --- identity --------------------------------------------------------------------------------------------------------


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
    not_before: datetime = Field(sa_column=_time(False))
    not_after: datetime = Field(sa_column=_time(False))
    crl_number: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    created_by: str = Field(default="unknown", sa_column=Column(Text, nullable=False, server_default="unknown"))
    retired_at: datetime | None = Field(default=None, sa_column=_time())


class RevocationList(SQLModel, table=True):
    """A signed CRL, as PEM."""

    __tablename__ = "crls"

    authority_id: str = Field(sa_column=Column(Text, primary_key=True))
    number: int = Field(sa_column=Column(BigInteger, primary_key=True))
    pem: str = Field(sa_column=Column(Text, nullable=False))
    revoked: int = Field(sa_column=Column(Integer, nullable=False))
    this_update: datetime = Field(sa_column=_time(False))
    next_update: datetime = Field(sa_column=_time(False))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))


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
    not_before: datetime = Field(sa_column=_time(False))
    not_after: datetime = Field(sa_column=_time(False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    issued_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    confirmed_at: datetime | None = Field(default=None, sa_column=_time())
    """When a connection proved that the device has this certificate and its key."""
    revoked_at: datetime | None = Field(default=None, sa_column=_time())
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
    expires_at: datetime = Field(sa_column=_time(False))
    disabled_at: datetime | None = Field(default=None, sa_column=_time())
    disabled_reason: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))
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
    requested_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    decided_at: datetime | None = Field(default=None, sa_column=_time())
    decided_by: str | None = Field(default=None, sa_column=Column(Text))


class DeviceConfiguration(SQLModel, table=True):
    """A version of a device's configuration: what was wanted, by whom, and when the device said that it runs it."""

    __tablename__ = "device_configurations"

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    version: int = Field(sa_column=Column(Integer, primary_key=True))
    config: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    actor: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    acknowledged_at: datetime | None = Field(default=None, sa_column=_time())


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
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    expires_at: datetime = Field(sa_column=_time(False))
    answered_at: datetime | None = Field(default=None, sa_column=_time())
    answer: str | None = Field(default=None, sa_column=Column(Text))


class DeviceWait(SQLModel, table=True):
    """A workflow that waits for something a device does; removed when it has happened (store/waits.py)."""

    __tablename__ = "device_waits"

    device_id: str = Field(sa_column=Column(Text, primary_key=True))
    event: str = Field(sa_column=Column(Text, primary_key=True))
    workflow_id: str = Field(sa_column=Column(Text, primary_key=True))
    at_least: int | None = Field(default=None, sa_column=Column(Integer))
    """For configurations: the version from which on the wait is over."""
    since: datetime | None = Field(default=None, sa_column=_time(False, True))


class OutboxSignal(SQLModel, table=True):
    """A signal to a workflow, written in the transaction that gives cause for it; a worker delivers it."""

    __tablename__ = "workflow_outbox"

    outbox_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    workflow_id: str = Field(sa_column=Column(Text, nullable=False))
    event: dict[str, Any] = Field(sa_column=Column(JSONB, nullable=False))
    attempts: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    created_at: datetime | None = Field(default=None, sa_column=_time(False, True))


class Tombstone(SQLModel, table=True):
    """A retired serial number: it cannot be enrolled again until somebody releases it."""

    __tablename__ = "tombstones"
    __table_args__ = (
        Index("tombstones_standing", "serial_number", unique=True, postgresql_where=text("released_at IS NULL")),
    )

    tombstone_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    serial_number: str = Field(sa_column=Column(Text, nullable=False))
    device_id: str = Field(sa_column=Column(Text, nullable=False))
    retired_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    retired_by: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    released_at: datetime | None = Field(default=None, sa_column=_time())
    released_by: str | None = Field(default=None, sa_column=Column(Text))


class AccessState(SQLModel, table=True):
    """One row: a number that grows with every change of who may speak. Brokers are brought to it (`access/`)."""

    __tablename__ = "access_state"
    __table_args__ = (CheckConstraint("one_row", name="access_state_one_row"),)

    one_row: bool = Field(default=True, sa_column=Column(Boolean, primary_key=True, server_default="true"))
    revision: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    changed_at: datetime | None = Field(default=None, sa_column=_time(False, True))


class BrokerState(SQLModel, table=True):
    """A broker and the revision of access that it enforces."""

    __tablename__ = "brokers"

    broker_id: str = Field(sa_column=Column(Text, primary_key=True))
    applied_revision: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default="0"))
    applied_at: datetime | None = Field(default=None, sa_column=_time())
    crl_next_update: datetime | None = Field(default=None, sa_column=_time())
    seen_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    error: str | None = Field(default=None, sa_column=Column(Text))


class AuditEvent(SQLModel, table=True):
    """Who or what did what to an identity, when and why. Append-only: a trigger refuses changes."""

    __tablename__ = "audit_events"
    __table_args__ = (
        Index("audit_events_subject", "subject_kind", "subject", "event_no"),
        Index("audit_events_at", "at"),
    )

    event_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    at: datetime | None = Field(default=None, sa_column=_time(False, True))
    actor: str = Field(sa_column=Column(Text, nullable=False))
    action: str = Field(sa_column=Column(Text, nullable=False))
    subject_kind: str = Field(sa_column=Column(Text, nullable=False))
    subject: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=""))
    details: dict[str, Any] = Field(default_factory=dict, sa_column=Column(JSONB, nullable=False, server_default="{}"))


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
    state: str = Field(sa_column=Column(Text, nullable=False))
    occurrences: int = Field(default=1, sa_column=Column(Integer, nullable=False, server_default="1"))
    opened_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    last_at: datetime | None = Field(default=None, sa_column=_time(False, True))
    acknowledged_at: datetime | None = Field(default=None, sa_column=_time())
    acknowledged_by: str | None = Field(default=None, sa_column=Column(Text))
    resolved_at: datetime | None = Field(default=None, sa_column=_time())
    resolved_by: str | None = Field(default=None, sa_column=Column(Text))


class LookupCache(SQLModel, table=True):
    """A cache of devices that wants to hear of changes; without one, the trigger on `devices` writes nothing."""

    __tablename__ = "lookup_caches"

    cache_id: str = Field(sa_column=Column(Text, primary_key=True))
    seen_at: datetime | None = Field(default=None, sa_column=_time(False, True))


class CacheInvalidation(SQLModel, table=True):
    """A device whose cached entry is out of date; written by the trigger, removed once the cache has forgotten it."""

    __tablename__ = "cache_invalidations"

    invalidation_no: int | None = Field(
        default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True)
    )
    device_id: str = Field(sa_column=Column(Text, nullable=False))
    serial_number: str = Field(sa_column=Column(Text, nullable=False))
