"""What a `Ledger` holds (domain/admission.py): jobs, waves and executions as rows, and what comes of a batch beside them.

Plain objects that are read, changed in memory and written back. Times are seconds since the epoch, by PostgreSQL's clock.
"""

import math
from dataclasses import dataclass, field

from domain.gate import Breaker
from models.protocol import ErrorCode, ExecutionState
from models.rollout import JobStatus

COUNTERS = {state: state.value.lower() for state in ExecutionState}
"""The counter of each state on a wave's row."""


@dataclass(slots=True)
class WaveRow:
    """A wave's counters and breaker."""

    job_no: int
    wave: int
    status: str
    completion_count: int
    counts: dict[str, int]
    gate_succeeded: int
    gate_failed: int
    breaker: Breaker
    tripped_at: float | None = None
    tripped_failed: int | None = None
    tripped_exposed: int | None = None
    answered_at: float | None = None
    retrying: int = 0
    """Of `queued`: those that have failed and wait for their next attempt."""
    attempts_failed: int = 0
    changed: bool = False
    news: bool = False
    """Something the wave's driver waits for has happened: tripped, answered, or nothing outstanding any more."""

    @property
    def outstanding(self) -> int:
        """Executions of this wave that are not terminal."""
        return self.counts["pending"] + self.counts["queued"] + self.counts["in_progress"]


@dataclass(slots=True)
class JobRow:
    """A job's status, cap, pace and deadlines."""

    job_no: int
    job_id: str
    operation: str
    status: str
    in_flight_cap: int
    per_minute: int | None
    in_flight: int
    exposed: int
    by_delta: int
    admitted: dict[int, int]
    """Admissions by second, of the last minute; kept only while there is a limit."""
    phase_seconds: tuple[float, float, float]
    """Deadlines of DeadlinePhase's members."""
    target_version: str | None
    target_sha256: str | None
    waves: dict[int, WaveRow] = field(default_factory=dict)
    accept_seconds: float = math.inf
    max_attempts: int = 1
    backoff_seconds: float = 0.0
    """Before the second attempt; before each later one `backoff_multiplier` times as long, up to `max_backoff_seconds`."""
    backoff_multiplier: float = 1.0
    max_backoff_seconds: float = math.inf
    diagnostics: tuple[str, ...] = ()
    """What a diagnostic job asks of every device."""
    changed: bool = False

    def pause_after(self, attempt: int) -> float:
        """Seconds from the failure of this attempt (from 1) to the next."""
        return min(self.max_backoff_seconds, self.backoff_seconds * self.backoff_multiplier ** (attempt - 1))

    @property
    def grants_retries(self) -> bool:
        """Not while it ends: what is withdrawn is withdrawn."""
        return self.status not in (JobStatus.HALTED, JobStatus.FINISHED) and not any(
            wave.tripped_at is not None for wave in self.waves.values()
        )


@dataclass(slots=True)
class ExecutionRow:
    """One job on one device."""

    job_no: int
    device_id: str
    wave: int
    state: ExecutionState
    version_number: int
    execution_number: int
    step: str | None
    details: dict[str, str] | None
    failure_class: str | None
    reason: str | None
    base_sha256: str | None
    by_delta: bool | None
    queued_at: float | None
    started_at: float | None
    updated_at: float | None
    finished_at: float | None
    deadline_at: float | None
    retry_at: float | None = None
    """While QUEUED after a failure: when the next attempt may begin."""
    boot_id: str | None = None
    """Of a restart: the boot in which the attempt began."""
    known_boot: str | None = None
    """The boot that the device's heartbeats tell of now."""
    wanted_config: int | None = None
    """Of a config-sync: the version that is wanted of the device now."""
    ended_attempt: "FailedAttempt | None" = None
    """The attempt that failed in this batch, where another one follows: what its device is answered."""
    changed: bool = False

    @property
    def retrying(self) -> bool:
        """Waits for its next attempt."""
        return self.state is ExecutionState.QUEUED and self.execution_number > 1


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """An attempt that failed, was rejected or timed out. `retry_at` None: it was the last."""

    job_no: int
    device_id: str
    attempt: int
    state: ExecutionState
    failure_class: str | None
    reason: str | None
    details: dict[str, str] | None
    version_number: int
    started_at: float | None
    failed_at: float
    retry_at: float | None


@dataclass(frozen=True, slots=True)
class Question:
    """What a diagnostic job asks of a device in one attempt."""

    request_id: str
    device_id: str
    type: str
    job_no: int
    attempt: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Report:
    """A device's `update` request."""

    status: ExecutionState
    details: dict[str, str] | None = None
    expected_version: int | None = None
    execution_number: int | None = None
    duplicate: bool = False
    """The broker says that it may have delivered this before."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is rejected."""

    code: ErrorCode
    message: str
