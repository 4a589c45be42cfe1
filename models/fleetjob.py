"""What a fleet job's workflow, activities and operators say to each other; its specification is models.jobspec's.

A fleet job does one thing on many devices: over the executions and waves of a rollout, without its release gate unless
one is asked for. All models are frozen; every field added later has a default.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, computed_field

from models.ids import fleet_job_workflow_id, scheduled_workflow_id
from models.jobspec import FleetJobSpec, Membership, RetrySpec
from models.protocol import JobOperation
from models.rollout import DecidedWave, JobStatus, Outcome, Phase, PlannedWave, PlanRolloutResult, WaveProgress

__all__ = [
    "CancelFleetJobInput",
    "FailureView",
    "FleetJobProgress",
    "FleetJobResult",
    "FleetJobSpec",
    "FleetJobState",
    "FleetJobStatus",
    "FleetJobView",
    "JobScheduleView",
    "Membership",
    "PauseFleetJobInput",
    "PlanFleetJobInput",
    "ResumeFleetJobInput",
    "RetrySpec",
    "StartFleetJobInput",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class FleetJobState(BaseModel):
    """Everything FleetJobWorkflow remembers: what it continues with as a new run. The workflow alone changes it.

    A phase of PAUSED is never stored; it is shown while `paused_by` is set.
    """

    name: str = ""
    """Of this run: a schedule's runs have the time in theirs."""
    phase: Phase = Phase.PLANNING
    reason: str = ""
    plan: PlanRolloutResult | None = None
    prepared: bool = False
    wave: int = 0
    decided: list[DecidedWave] = Field(default_factory=list)
    paused_by: str = ""
    pause_reason: str = ""
    resumed_by: str = ""
    """Who has let a wave go on that was held."""
    canceled_by: str = ""
    cancel_reason: str = ""
    force: bool = False
    time_is_up: bool = False
    outcome: Outcome | None = None

    @property
    def shown_phase(self) -> Phase:
        """The phase a person sees."""
        over = self.phase in (Phase.DRAINING, Phase.DONE)
        return Phase.PAUSED if self.paused_by and not over else self.phase


class StartFleetJobInput(_Frozen):
    """Input of FleetJobWorkflow. `schedule`: the schedule that started it, if one did."""

    spec: FleetJobSpec
    requested_by: str = "unknown"
    schedule: str | None = None
    state: FleetJobState | None = None
    """Given by the run before, when a job continues as a new one."""


class PlanFleetJobInput(_Frozen):
    """Plan a job: choose devices, number them, cut waves. Idempotent by its name and specification."""

    spec: FleetJobSpec
    requested_by: str = "unknown"
    schedule: str | None = None


class FleetJobProgress(_Frozen):
    """A job's figures at one moment: they always add up to `total`."""

    total: int = 0
    waiting: int = 0
    """Not started: pending, queued, or waiting for the next attempt."""
    in_progress: int = 0
    succeeded: int = 0
    failed: int = 0
    """For good: FAILED, TIMED_OUT or REJECTED with no attempt left."""
    withdrawn: int = 0
    """CANCELED or REMOVED."""
    retrying: int = 0
    """Of `waiting`: those that have failed and wait for their next attempt."""
    attempts_failed: int = 0
    """Attempts that failed, those that were followed by another included."""

    @classmethod
    def of(cls, waves: Iterable[WaveProgress]) -> "FleetJobProgress":
        """Sums over waves of one snapshot."""
        counts = [wave.counts for wave in waves]
        return cls(
            total=sum(c.total for c in counts),
            waiting=sum(c.pending + c.queued for c in counts),
            in_progress=sum(c.in_progress for c in counts),
            succeeded=sum(c.succeeded for c in counts),
            failed=sum(c.failed + c.timed_out + c.rejected for c in counts),
            withdrawn=sum(c.removed + c.canceled for c in counts),
            retrying=sum(c.retrying for c in counts),
            attempts_failed=sum(c.attempts_failed for c in counts),
        )


class FleetJobResult(_Frozen):
    """Result of FleetJobWorkflow."""

    name: str
    outcome: Outcome
    reason: str
    progress: FleetJobProgress = FleetJobProgress()
    waves: tuple[WaveProgress, ...] = ()


class FleetJobStatus(_Frozen):
    """Answer of FleetJobWorkflow's `status` query; counts are PostgreSQL's."""

    name: str
    phase: Phase
    reason: str = ""
    job_no: int | None = None
    devices: int = 0
    wave: int = 0
    waves: tuple[PlannedWave, ...] = ()
    start_at: datetime | None = None
    outcome: Outcome | None = None


class PauseFleetJobInput(_Frozen):
    """Stop admission until resumed."""

    actor: str
    reason: str = Field(default="", max_length=500)


class ResumeFleetJobInput(_Frozen):
    """Admit again."""

    actor: str
    reason: str = Field(default="", max_length=500)


class CancelFleetJobInput(_Frozen):
    """End the job: nothing more starts. `force`: devices that are in progress are cancelled too, instead of awaited."""

    actor: str
    reason: str = Field(default="", max_length=500)
    force: bool = False


class FailureView(_Frozen):
    """A failed attempt, as it is recorded."""

    device_id: str
    attempt: int
    state: str
    failure_class: str | None = None
    reason: str | None = None
    details: dict[str, str] | None = None
    """What the device had said in it, last: its `statusDetails`, which the next attempt begins without."""
    started_at: datetime | None = None
    failed_at: datetime
    retry_at: datetime | None = None


class FleetJobView(_Frozen):
    """A job as it is listed and shown."""

    job_no: int
    job_id: str
    name: str
    operation: JobOperation
    status: JobStatus
    phase: Phase
    outcome: Outcome | None = None
    reason: str = ""
    requested_by: str
    schedule: str | None = None
    retry_of: str | None = None
    continuous: bool = False
    in_flight_cap: int
    max_attempts: int
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    progress: FleetJobProgress
    waves: tuple[WaveProgress, ...] = ()
    spec: dict[str, Any] = Field(default_factory=dict)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def workflow_id(self) -> str:
        """Where its workflow is found: a schedule's runs have ids that Temporal has made."""
        return fleet_job_workflow_id(self.name) if self.schedule is None else scheduled_workflow_id(self.name)


class JobScheduleView(_Frozen):
    """A schedule of jobs as it is listed. Times are UTC; `next_runs` are the next few."""

    name: str
    cron: str = ""
    timezone: str = "UTC"
    paused: bool = False
    note: str = ""
    operation: JobOperation | None = None
    next_runs: tuple[datetime, ...] = ()
    last_runs: tuple[str, ...] = ()
    """Names of its last jobs, the newest last."""
