"""What workflows, activities and operators say to each other about a rollout. All frozen, all with defaults for growth."""

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from models.jobspec import FleetJobSpec
from models.spec import PaceSpec, RolloutSpec


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Verdict(StrEnum):
    """What a gate says. Everything unknown is HOLD."""

    PROMOTE = "promote"
    CONTINUE = "continue"
    HOLD = "hold"
    HALT = "halt"


class Phase(StrEnum):
    """Where a rollout stands; the search attribute `TidegatePhase` and the column `jobs.phase`."""

    SCHEDULED = "scheduled"
    """A job that waits for its time."""
    PLANNING = "planning"
    WAITING_APPROVAL = "waiting-approval"
    ROLLING = "rolling"
    SOAKING = "soaking"
    PAUSED = "paused"
    HOLDING = "holding"
    DRAINING = "draining"
    DONE = "done"


class Outcome(StrEnum):
    """How a rollout ended."""

    SUCCEEDED = "succeeded"
    COMPLETED = "completed"
    """A fleet job that ran to its end, and failed on some of its devices."""
    HALTED = "halted"
    ABORTED = "aborted"
    REFUSED = "refused"
    FAILED = "failed"


class JobStatus(StrEnum):
    """What admission asks of a job: only RUNNING admits. It is a column of PostgreSQL, not of Temporal."""

    PLANNED = "planned"
    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"
    FINISHED = "finished"


class WaveStatus(StrEnum):
    """Only OPEN admits; a wave stays open through its soak so that late devices still get their update."""

    PENDING = "pending"
    OPEN = "open"
    CLOSED = "closed"


class WaveCounts(_Frozen):
    """Executions of one wave (or of a whole job) by state, and what of them the gate counts."""

    pending: int = 0
    queued: int = 0
    in_progress: int = 0
    succeeded: int = 0
    failed: int = 0
    timed_out: int = 0
    rejected: int = 0
    removed: int = 0
    canceled: int = 0
    gate_succeeded: int = 0
    gate_failed: int = 0
    retrying: int = 0
    """Of `queued`: those that have failed and wait for their next attempt."""
    attempts_failed: int = 0
    """Attempts that failed, those that were followed by another included."""

    @property
    def total(self) -> int:
        """Every execution."""
        return self.outstanding + self.terminal

    @property
    def outstanding(self) -> int:
        """Executions that are not terminal."""
        return self.pending + self.queued + self.in_progress

    @property
    def terminal(self) -> int:
        """Executions that are over."""
        return self.succeeded + self.failed + self.timed_out + self.rejected + self.removed + self.canceled

    @property
    def awaited(self) -> int:
        """Executions that an answer can be expected of: all but those of devices that have left the fleet."""
        return self.total - self.removed

    @property
    def exposed(self) -> int:
        """Executions that have answered or still may: the n of the breaker."""
        return self.answered + self.in_progress

    @property
    def answered(self) -> int:
        """Executions that have said something about the release."""
        return self.gate_succeeded + self.gate_failed


class WaveProgress(_Frozen):
    """A wave as PostgreSQL has it at one moment."""

    wave: int
    name: str
    status: WaveStatus
    counts: WaveCounts
    tripped: bool = False
    tripped_failed: int | None = None
    tripped_exposed: int | None = None
    opened_at: datetime | None = None
    answered_at: datetime | None = None
    closed_at: datetime | None = None
    verdict: Verdict | None = None
    reason: str | None = None
    target_count: int = 0


class WaveVerdict(_Frozen):
    """A decision and its reason; the reason carries the numbers."""

    verdict: Verdict
    reason: str


class JobProgress(_Frozen):
    """What a wave's driver looks at: one wave, and the job it belongs to, at one moment."""

    wave: WaveProgress
    job_status: JobStatus
    job_id: str = ""
    outstanding: int = 0
    """Executions of the whole job that are not terminal."""
    retrying: int = 0
    """Of those: devices that have failed and wait for their next attempt."""
    in_flight: int = 0
    in_flight_cap: int = 1
    per_minute: int | None = None
    exposed: int = 0
    """Devices that ever started the update."""
    tripped_wave: int | None = None
    """A wave of this job whose breaker has tripped: it stops admission for all of them."""


# --- workflows -------------------------------------------------------------------------------------------------------


class PlannedWave(_Frozen):
    """One wave of a plan."""

    wave: int
    name: str
    devices: int


class PlanRolloutResult(_Frozen):
    """A plan as it stands in PostgreSQL. `bases`: sha256 of images in the field, most frequent first, with counts."""

    job_no: int
    devices: int
    waves: tuple[PlannedWave, ...]
    release_sha256: str = ""
    bases: tuple[tuple[str, int], ...] = ()


class DecidedWave(_Frozen):
    """A wave that is over, and why."""

    wave: int
    verdict: WaveVerdict


class RolloutState(BaseModel):
    """Everything RolloutWorkflow remembers: what it continues with as a new run, and what its queries answer from.

    The workflow alone changes it. `wave` is the wave that runs or ran last (0: none yet); a phase of PAUSED is never
    stored, it is shown while `paused_by` is set, so that resuming shows again what was underneath.
    """

    phase: Phase = Phase.PLANNING
    reason: str = ""
    plan: PlanRolloutResult | None = None
    prepared: bool = False
    wave: int = 0
    decided: list[DecidedWave] = Field(default_factory=list)
    pace: PaceSpec = PaceSpec()
    waiting_for: str = ""
    approved_wave: int = 0
    """Approved up to this wave; an approval of the start approves wave 1."""
    soak_until: datetime | None = None
    paused_by: str = ""
    pause_reason: str = ""
    aborted_by: str = ""
    abort_reason: str = ""
    promoted_by: str = ""
    promote_reason: str = ""
    outcome: Outcome | None = None

    @property
    def shown_phase(self) -> Phase:
        """The phase a person sees."""
        over = self.phase in (Phase.DRAINING, Phase.DONE)
        return Phase.PAUSED if self.paused_by and not over else self.phase

    def planned_wave(self, wave: int) -> PlannedWave | None:
        """A wave of the plan by its number, None while there is no plan or no such wave."""
        found = (planned for planned in self.plan.waves if planned.wave == wave) if self.plan else iter(())
        return next(found, None)


class StartRolloutInput(_Frozen):
    """Input of RolloutWorkflow. `state` is given by the run before, when a rollout continues as a new one."""

    spec: RolloutSpec
    requested_by: str = "unknown"
    state: RolloutState | None = None


class RolloutResult(_Frozen):
    """Result of RolloutWorkflow. `exposed`: devices that ever started the update."""

    name: str
    outcome: Outcome
    reason: str
    devices: int = 0
    succeeded: int = 0
    failed: int = 0
    exposed: int = 0
    by_delta: int = 0
    waves: tuple[WaveProgress, ...] = ()


class RunWaveInput(_Frozen):
    """Input of WaveWorkflow. `is_last`: stay until every device of the rollout has answered or run out of time."""

    rollout: str
    job_no: int
    wave: int
    name: str
    target_count: int
    spec: RolloutSpec | FleetJobSpec
    is_last: bool = False


class RunWaveResult(_Frozen):
    """Result of WaveWorkflow."""

    verdict: WaveVerdict
    progress: WaveProgress


# --- activities ------------------------------------------------------------------------------------------------------


class PlanRolloutInput(_Frozen):
    """Plan a rollout: choose devices, number them, cut waves. Idempotent by the rollout's name and workflow run."""

    spec: RolloutSpec
    requested_by: str = "unknown"


class PrepareArtifactsInput(_Frozen):
    """Build the deltas from these bases that do not exist yet, and write the job document."""

    job_no: int
    target_sha256: str
    bases: tuple[tuple[str, int], ...] = ()


class PrepareArtifactsResult(_Frozen):
    """`failed` names base and reason of deltas that could not be made: those devices get the full image."""

    built: int = 0
    reused: int = 0
    failed: tuple[str, ...] = ()
    delta_bytes: int = 0


class WriteDocumentInput(_Frozen):
    """Write the job document without deltas, when preparing artifacts has failed. Idempotent."""

    job_no: int


class DriveMode(StrEnum):
    """ANSWERING: until the wave has answered. SOAKING: until cancelled, or until a breaker trips.
    JUDGING: the soak is over; sweep, judge fresh counts, record the verdict."""

    ANSWERING = "answering"
    SOAKING = "soaking"
    JUDGING = "judging"


class DriveWaveInput(_Frozen):
    """Sweep deadlines, pace notifications, watch counters; return as soon as the verdict is not CONTINUE.

    `soaks`: a promotion is not recorded yet, a soak comes first. `promoted_by`: who ended that soak early, if anyone.
    """

    job_no: int
    wave: int
    spec: RolloutSpec | FleetJobSpec
    is_last: bool = False
    mode: DriveMode = DriveMode.ANSWERING
    soaks: bool = False
    phase: Phase | None = None
    """What to show of the job meanwhile, with `phase_reason`; None: leave it."""
    phase_reason: str = ""
    promoted_by: str = ""
    promote_reason: str = ""


class DriveHeartbeat(_Frozen):
    """What a driver shows of itself in the Temporal UI. Never the record of progress: that is PostgreSQL."""

    wave: int
    mode: DriveMode
    answered: int = 0
    failed: int = 0
    in_progress: int = 0
    outstanding: int = 0
    hints_sent: int = 0


class DriveWaveResult(_Frozen):
    """Why the drive ended, and the wave at that moment."""

    verdict: WaveVerdict
    progress: WaveProgress


class CloseWaveInput(_Frozen):
    """Record a wave's verdict. HALT also stops admission for the whole job in the same transaction."""

    job_no: int
    wave: int
    verdict: WaveVerdict


class CheckPromotableInput(_Frozen):
    """Refuse a person's promotion when a breaker has tripped."""

    job_no: int
    wave: int
    spec: RolloutSpec


class SetJobStatusInput(_Frozen):
    """Pause or resume admission. Idempotent."""

    job_no: int
    status: JobStatus
    phase: Phase
    reason: str
    actor: str = "workflow"


class AdjustPaceInput(_Frozen):
    """Change pace and cap; takes effect with the next admission."""

    job_no: int
    pace: PaceSpec
    actor: str = "workflow"


class FinishRolloutInput(_Frozen):
    """Close the job: withdraw what is only pending or queued, tell those devices, write the outcome. Idempotent."""

    job_no: int
    outcome: Outcome
    reason: str
    drain: bool = False
    """Wait for devices IN_PROGRESS to end (by report or deadline) before the job is closed."""


class CancelRunningInput(_Frozen):
    """Cancel devices IN_PROGRESS of a job that admits nobody any more, and tell them. Idempotent."""

    job_no: int
    reason: str


class FinishRolloutResult(_Frozen):
    """Final figures from PostgreSQL. `outcome`: what was recorded; a job that succeeded on some devices alone is COMPLETED."""

    outcome: Outcome | None = None
    devices: int = 0
    succeeded: int = 0
    failed: int = 0
    exposed: int = 0
    by_delta: int = 0
    waves: tuple[WaveProgress, ...] = ()


# --- updates and queries ---------------------------------------------------------------------------------------------


class PauseRolloutInput(_Frozen):
    """Stop admission until resumed. `actor` is who asked."""

    actor: str
    reason: str = Field(default="", max_length=500)


class ResumeRolloutInput(_Frozen):
    """Admit again."""

    actor: str
    reason: str = Field(default="", max_length=500)


class ApproveRolloutInput(_Frozen):
    """Agree to what the rollout waits for."""

    actor: str
    reason: str = Field(default="", max_length=500)


class PromoteRolloutInput(_Frozen):
    """End a HOLD or the rest of a soak in favour of the release. Refused once the breaker has tripped."""

    actor: str
    reason: str = Field(default="", max_length=500)


class AbortRolloutInput(_Frozen):
    """End the rollout: nothing more is admitted, what is only queued is withdrawn."""

    actor: str
    reason: str = Field(default="", max_length=500)


class AdjustRolloutInput(_Frozen):
    """New pace; a value left out stays as it is. `unlimited_per_minute` takes the per-minute limit away."""

    actor: str
    in_flight: int | None = Field(default=None, ge=1)
    per_minute: int | None = Field(default=None, ge=1)
    unlimited_per_minute: bool = False


class WaveSoaking(_Frozen):
    """Signal of a wave to the workflow that started it: it has answered, and is watched until `until`."""

    wave: int
    until: datetime
    reason: str


class EndSoakInput(_Frozen):
    """Signal to a wave: a person ends its soak in favour of the release. The breaker still has the last word."""

    actor: str
    reason: str = ""


class FindDeviceInput(_Frozen):
    """Input of the `device` query."""

    device_id: str


class DevicePlace(_Frozen):
    """Answer of the `device` query: where its execution is kept, and which waves are served now.

    A query does no I/O, and a workflow knows no device; the execution itself is the row (`job_no`, `device_id`) of
    PostgreSQL's `executions`, which the command line reads with this.
    """

    rollout: str
    device_id: str
    job_id: str
    job_no: int | None = None
    phase: Phase
    waves_served: tuple[PlannedWave, ...] = ()


class RolloutStatus(_Frozen):
    """Answer of the `status` query: what the workflow knows without asking PostgreSQL."""

    name: str
    phase: Phase
    reason: str = ""
    wave: int = 0
    wave_name: str = ""
    job_no: int | None = None
    devices: int = 0
    waiting_for: str = ""
    soak_until: datetime | None = None
    outcome: Outcome | None = None
    pace: PaceSpec | None = None
    verdicts: tuple[str, ...] = ()


class WaveStatusReport(_Frozen):
    """Answer of WaveWorkflow's `status` query."""

    rollout: str
    wave: int
    phase: Phase
    reason: str = ""
    soak_until: datetime | None = None
