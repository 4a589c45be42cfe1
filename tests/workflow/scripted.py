"""A rollout played from a script: the activities' names and models, no PostgreSQL, no clock of its own.

Each wave is a list of moves, one for each call of `drive_wave` in a mode; the tracker `asked` keeps what the workflow
really asked for, in order. A soak that nothing disturbs is an activity that is always about to be tried again: the
time-skipping server skips timers only while no activity is running.
"""

import asyncio
from collections import defaultdict, deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from domain.gate import judge_answered
from models.errors import ConflictError, NotFoundError, RefusedError
from models.fleetjob import PlanFleetJobInput
from models.rollout import (
    AdjustPaceInput,
    CancelRunningInput,
    CheckPromotableInput,
    CloseWaveInput,
    DriveMode,
    DriveWaveInput,
    DriveWaveResult,
    FinishRolloutInput,
    FinishRolloutResult,
    PlannedWave,
    PlanRolloutInput,
    PlanRolloutResult,
    PrepareArtifactsInput,
    PrepareArtifactsResult,
    SetJobStatusInput,
    Verdict,
    WaveCounts,
    WaveProgress,
    WaveStatus,
    WaveVerdict,
    WriteDocumentInput,
)

REASONS = {
    Verdict.PROMOTE: "promote: 20 of 20 succeeded",
    Verdict.HOLD: "hold: 12 of 20 answered, 19 needed",
    Verdict.HALT: "halt: 5 of 5 exposed devices failed (100.0 %), boundary 4.3",
}
ERRORS = {error.__name__: error for error in (ConflictError, NotFoundError, RefusedError)}


@dataclass(frozen=True)
class Says:
    """A driver ends with this verdict."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Fails:
    """An attempt fails, as with a database that is away."""

    message: str = "the database does not answer"


@dataclass(frozen=True)
class Waits:
    """A driver that has nothing to report: it would go on for ever."""


@dataclass(frozen=True)
class Runs:
    """A driver that is running until the test sets `answers`, and promotes then. Time does not run ahead meanwhile."""


PROMOTE, HOLD, HALT = Says(Verdict.PROMOTE), Says(Verdict.HOLD), Says(Verdict.HALT)
Move = Says | Fails | Waits | Runs


@dataclass
class ScriptedRollout:
    """Give `moves[wave, mode]` before the start; what is left out promotes, and soaks are quiet."""

    waves: tuple[tuple[str, int], ...] = (("canary", 3), ("early", 12), ("fleet", 45))
    moves: dict[tuple[int, DriveMode], deque[Move]] = field(default_factory=lambda: defaultdict(deque))
    plan_errors: deque[tuple[str, str]] = field(default_factory=deque)
    status_errors: deque[tuple[str, str]] = field(default_factory=deque)
    pace_errors: deque[str] = field(default_factory=deque)
    artifacts_error: str = ""
    tripped: str = ""
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    drains: bool = False
    """Devices in progress are waited for until the test sets `drained`, or they are cancelled."""
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[Any] = field(default_factory=list)

    def script(self, wave: int, mode: DriveMode, *moves: Move) -> None:
        """What drivers of this wave and mode do, one after the other."""
        self.moves[wave, mode].extend(moves)

    def kinds(self) -> list[str]:
        """What was asked for, in order: `drive 1 answering`, `PAUSED by alice`, ..."""
        return [_kind(request) for request in self.asked]

    def only(self, kind: type[Any]) -> list[Any]:
        """Requests of one type."""
        return [request for request in self.asked if isinstance(request, kind)]

    # --- the activities ----------------------------------------------------------------------------------------------

    @activity.defn
    async def plan_rollout(self, asked: PlanRolloutInput) -> PlanRolloutResult:
        """The plan, or the next error of the script."""
        return self._plan(asked)

    @activity.defn
    async def plan_fleet_job(self, asked: PlanFleetJobInput) -> PlanRolloutResult:
        """The same for a fleet job."""
        return self._plan(asked)

    def _plan(self, asked: PlanRolloutInput | PlanFleetJobInput) -> PlanRolloutResult:
        self.asked.append(asked)
        if self.plan_errors:
            kind, message = self.plan_errors.popleft()
            raise ERRORS.get(kind, RuntimeError)(message)
        return PlanRolloutResult(
            job_no=7,
            devices=sum(devices for _, devices in self.waves),
            waves=tuple(PlannedWave(wave=n, name=name, devices=d) for n, (name, d) in enumerate(self.waves, 1)),
            release_sha256="ab" * 32,
            bases=(("cd" * 32, 60),),
        )

    @activity.defn
    async def prepare_artifacts(self, asked: PrepareArtifactsInput) -> PrepareArtifactsResult:
        """One delta, or the error of the script."""
        self.asked.append(asked)
        if self.artifacts_error:
            raise ApplicationError(self.artifacts_error, non_retryable=True)
        return PrepareArtifactsResult(built=1, delta_bytes=40_000)

    @activity.defn
    async def write_plain_document(self, asked: WriteDocumentInput) -> None:
        """Noted."""
        self.asked.append(asked)

    @activity.defn
    async def drive_wave(self, asked: DriveWaveInput) -> DriveWaveResult:
        """The next move of this wave and mode."""
        moves = self.moves[asked.wave, asked.mode]
        default: Move = Waits() if asked.mode is DriveMode.SOAKING else PROMOTE
        move = moves.popleft() if moves else default
        if not isinstance(move, Waits) or activity.info().attempt == 1:
            self.asked.append(asked)
        match move:
            case Runs():
                while not self.answers.is_set():
                    activity.heartbeat()
                    await asyncio.sleep(0.02)
                return self._driven(asked, WaveVerdict(verdict=Verdict.PROMOTE, reason=REASONS[Verdict.PROMOTE]))
            case Fails(message):
                raise RuntimeError(message)
            case Waits():
                raise ApplicationError(
                    "nothing to report", next_retry_delay=timedelta(days=365), category=ApplicationErrorCategory.BENIGN
                )
            case Says(verdict, reason):
                return self._driven(asked, WaveVerdict(verdict=verdict, reason=reason or REASONS[verdict]))

    def _driven(self, asked: DriveWaveInput, verdict: WaveVerdict) -> DriveWaveResult:
        name, devices = self.waves[asked.wave - 1]
        failed = devices if verdict.verdict is Verdict.HALT else 0
        counts = WaveCounts(succeeded=devices - failed, gate_succeeded=devices - failed, gate_failed=failed)
        if asked.promoted_by:
            verdict = verdict.model_copy(update={"reason": f"promoted by {asked.promoted_by} ({verdict.reason})"})
        assert judge_answered(counts, asked.spec.gate, asked.spec.completion)
        progress = WaveProgress(wave=asked.wave, name=name, status=WaveStatus.OPEN, counts=counts, target_count=devices)
        return DriveWaveResult(verdict=verdict, progress=progress)

    @activity.defn
    async def close_wave(self, asked: CloseWaveInput) -> None:
        """Noted."""
        self.asked.append(asked)

    @activity.defn
    async def check_promotable(self, asked: CheckPromotableInput) -> None:
        """Refused when the script says that a breaker has tripped."""
        self.asked.append(asked)
        if self.tripped:
            raise RefusedError(self.tripped)

    @activity.defn
    async def set_job_status(self, asked: SetJobStatusInput) -> None:
        """Noted, after the next error of the script."""
        if self.status_errors:
            kind, message = self.status_errors.popleft()
            raise ERRORS.get(kind, RuntimeError)(message)
        self.asked.append(asked)

    @activity.defn
    async def adjust_pace(self, asked: AdjustPaceInput) -> None:
        """Noted, after the next error of the script."""
        if self.pace_errors:
            raise RuntimeError(self.pace_errors.popleft())
        self.asked.append(asked)

    @activity.defn
    async def cancel_running(self, asked: CancelRunningInput) -> None:
        """Noted; devices in progress have ended."""
        self.asked.append(asked)
        self.drained.set()

    @activity.defn
    async def finish_rollout(self, asked: FinishRolloutInput) -> FinishRolloutResult:
        """Figures of a rollout in which everyone succeeded, or nobody."""
        self.asked.append(asked)
        while asked.drain and self.drains and not self.drained.is_set():
            activity.heartbeat()
            await asyncio.sleep(0.02)
        devices = sum(devices for _, devices in self.waves)
        succeeded = 0 if asked.drain else devices
        return FinishRolloutResult(devices=devices, succeeded=succeeded, exposed=devices, by_delta=succeeded)

    def activities(self) -> list[Any]:
        """For a worker."""
        return [
            self.plan_rollout,
            self.prepare_artifacts,
            self.write_plain_document,
            self.drive_wave,
            self.close_wave,
            self.check_promotable,
            self.set_job_status,
            self.adjust_pace,
            self.finish_rollout,
            self.plan_fleet_job,
            self.cancel_running,
        ]


def _kind(request: Any) -> str:
    match request:
        case DriveWaveInput():
            return f"drive {request.wave} {request.mode}"
        case SetJobStatusInput():
            return f"{request.status} by {request.actor}"
        case CloseWaveInput():
            return f"close {request.wave} {request.verdict.verdict}"
        case FinishRolloutInput():
            return f"finish {request.outcome}"
        case _:
            return type(request).__name__.removesuffix("Input")
