"""Releases, and the jobs that bring them (and other work) to devices.

Counters on `waves` and `jobs` change only in the transaction that changes executions, under the lock of the job's row.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    SmallInteger,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import BYTEA, DOUBLE_PRECISION, JSONB
from sqlmodel import Field, SQLModel

from models.tables.columns import moment


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
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))


class Delta(SQLModel, table=True):
    """A delta that was built, and verified by applying it; or the reason why there is none."""

    __tablename__ = "deltas"

    base_sha256: str = Field(sa_column=Column(Text, primary_key=True))
    target_sha256: str = Field(sa_column=Column(Text, primary_key=True))
    codec: str = Field(sa_column=Column(Text, primary_key=True))
    sha256: str | None = Field(default=None, sa_column=Column(Text))
    size_bytes: int | None = Field(default=None, sa_column=Column(BigInteger))
    failure: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))


class Job(SQLModel, table=True):
    """A rollout or a fleet job. Its row is the lock that every change of its executions takes."""

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
    max_attempts: int = Field(default=1, sa_column=Column(Integer, nullable=False, server_default="1"))
    backoff_seconds: float = Field(default=0, sa_column=Column(DOUBLE_PRECISION, nullable=False, server_default="0"))
    """Before the second attempt; before each later one `backoff_multiplier` times as long, up to `max_backoff_seconds`."""
    backoff_multiplier: float = Field(default=1, sa_column=Column(DOUBLE_PRECISION, nullable=False, server_default="1"))
    max_backoff_seconds: float = Field(
        default=0, sa_column=Column(DOUBLE_PRECISION, nullable=False, server_default="0")
    )
    continuous: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default="false"))
    retry_of: int | None = Field(default=None, sa_column=Column(BigInteger))
    """The job whose failed devices this one is for."""
    schedule: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime | None = Field(default=None, sa_column=moment(False, True))
    started_at: datetime | None = Field(default=None, sa_column=moment())
    finished_at: datetime | None = Field(default=None, sa_column=moment())


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
    retrying: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    """Of `queued`: those that have failed and wait for their next attempt."""
    attempts_failed: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    failure_weight: int = Field(sa_column=Column(BigInteger, nullable=False))
    success_weight: int = Field(sa_column=Column(BigInteger, nullable=False))
    halt_threshold: int = Field(sa_column=Column(BigInteger, nullable=False))
    tripped_at: datetime | None = Field(default=None, sa_column=moment())
    tripped_failed: int | None = Field(default=None, sa_column=Column(Integer))
    tripped_exposed: int | None = Field(default=None, sa_column=Column(Integer))
    notified_rank: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    opened_at: datetime | None = Field(default=None, sa_column=moment())
    answered_at: datetime | None = Field(default=None, sa_column=moment())
    closed_at: datetime | None = Field(default=None, sa_column=moment())
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
            "executions_open",
            "device_id",
            text("(CASE WHEN exclusive THEN 0 ELSE job_no END)"),
            unique=True,
            postgresql_where=text("state IN ('PENDING','QUEUED','IN_PROGRESS')"),
        ),
        Index("executions_by_rank", "job_no", "wave", "rank", unique=True),
        Index(
            "executions_retrying",
            "job_no",
            "wave",
            "retry_at",
            "device_id",
            postgresql_where=text("state = 'QUEUED' AND retry_at IS NOT NULL"),
        ),
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
    queued_at: datetime | None = Field(default=None, sa_column=moment())
    started_at: datetime | None = Field(default=None, sa_column=moment())
    updated_at: datetime | None = Field(default=None, sa_column=moment())
    finished_at: datetime | None = Field(default=None, sa_column=moment())
    deadline_at: datetime | None = Field(default=None, sa_column=moment())
    retry_at: datetime | None = Field(default=None, sa_column=moment())
    """While QUEUED after a failure: when the next attempt may begin."""
    boot_id: str | None = Field(default=None, sa_column=Column(Text))
    """Of a restart: the boot in which the attempt began; success is another one."""


class JobEvent(SQLModel, table=True):
    """What happened to a job, when, why and by whom: append-only."""

    __tablename__ = "job_events"
    __table_args__ = (Index("job_events_job", "job_no", "event_no"),)

    event_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    job_no: int = Field(sa_column=Column(BigInteger, nullable=False))
    at: datetime | None = Field(default=None, sa_column=moment(False, True))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    wave: int | None = Field(default=None, sa_column=Column(SmallInteger))
    actor: str = Field(default="tidegate", sa_column=Column(Text, nullable=False, server_default="tidegate"))
    text: str = Field(sa_column=Column(Text, nullable=False))


class QuarantinedMessage(SQLModel, table=True):
    """A message from a device that could not be used, as it came (the first 4 KiB of it)."""

    __tablename__ = "quarantine"

    message_no: int | None = Field(default=None, sa_column=Column(BigInteger, primary_key=True, autoincrement=True))
    at: datetime | None = Field(default=None, sa_column=moment(False, True))
    topic: str = Field(sa_column=Column(Text, nullable=False))
    thing: str | None = Field(default=None, sa_column=Column(Text))
    size_bytes: int = Field(sa_column=Column(Integer, nullable=False))
    payload: bytes = Field(sa_column=Column(BYTEA, nullable=False))
    code: str = Field(sa_column=Column(Text, nullable=False))
    reason: str = Field(sa_column=Column(Text, nullable=False))
