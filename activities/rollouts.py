"""The steps of a rollout that touch PostgreSQL or the broker.

Each is idempotent, and its docstring says by what. Errors that no repetition mends (`InvalidInputError`,
`NotFoundError`, `ConflictError`, `RefusedError`) are not retried, by their type's name (`workflows.options`);
everything else is an infrastructure that will answer again, and is tried until it does.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog
from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from activities.driving import WaveDriver
from activities.examining import Examiner
from activities.hinting import Hinter
from activities.lifecycle import DiagnosticFlows
from activities.notices import withdrawn_notices
from activities.rollout_records import NoticePublisher, RolloutRecords
from domain.verdicts import OVER, tripped_verdict
from models.errors import ConflictError, RefusedError, UnavailableError
from models.rollout import (
    AdjustPaceInput,
    CancelRunningInput,
    CheckPromotableInput,
    CloseWaveInput,
    DriveHeartbeat,
    DriveWaveInput,
    DriveWaveResult,
    FinishRolloutInput,
    FinishRolloutResult,
    JobStatus,
    PlanRolloutInput,
    PlanRolloutResult,
    SetJobStatusInput,
    WriteDocumentInput,
)

DRAIN_EVERY = timedelta(milliseconds=500)
"""Between two looks at devices that are waited for."""

BATCH_OF_NOTICES = 500
"""Heartbeat between batches of messages."""

log = structlog.get_logger()


@dataclass
class RolloutActivities:
    """Collaborators: what is true of a rollout, a way to tell devices, and, where it is given, one to ask them."""

    rollouts: RolloutRecords
    publisher: NoticePublisher
    flows: DiagnosticFlows | None = None

    @activity.defn
    async def plan_rollout(self, asked: PlanRolloutInput) -> PlanRolloutResult:
        """Plan. Idempotent by the rollout's name and specification.

        A rollout that was planned before and is not over is taken up where it stands; one that is over is refused.
        """
        plan = await self.rollouts.plan(asked)
        first = await self.rollouts.progress(plan.job_no, plan.waves[0].wave)
        if first.job_status is JobStatus.FINISHED:
            raise ConflictError(
                f"cannot start rollout {asked.spec.name}: it has run already, and is over; "
                f"'starter.py rollout show {asked.spec.name}' says how; give a new one another name"
            )
        return plan

    @activity.defn
    async def write_plain_document(self, asked: WriteDocumentInput) -> None:
        """The job document with the full image alone. Idempotent: it is written as a whole."""
        await self.rollouts.write_document(asked.job_no, [])

    @activity.defn
    async def drive_wave(self, asked: DriveWaveInput) -> DriveWaveResult:
        """Open the wave, watch it, and record its verdict. Idempotent: it resumes from PostgreSQL (activities.driving)."""
        hinter = Hinter(self.rollouts, self.publisher)
        examiner = Examiner(asked.job_no, self.rollouts, self.flows)
        return await WaveDriver(asked, self.rollouts, hinter, beat=_beat, examiner=examiner).drive()

    @activity.defn
    async def close_wave(self, asked: CloseWaveInput) -> None:
        """Record a verdict that a person brought about. Idempotent by its text."""
        await self.rollouts.close_wave(asked.job_no, asked.wave, asked.verdict)

    @activity.defn
    async def check_promotable(self, asked: CheckPromotableInput) -> None:
        """Raise RefusedError when a breaker has tripped or the job is over. Reads only."""
        await self.rollouts.sweep(asked.job_no)
        seen = await self.rollouts.progress(asked.job_no, asked.wave)
        halt = tripped_verdict(seen, asked.spec.gate)
        if halt is not None:
            raise RefusedError(f"cannot promote wave {asked.wave}: {halt.reason}; nobody overrules the breaker")
        if seen.job_status in OVER:
            raise RefusedError(f"cannot promote wave {asked.wave}: the job is {seen.job_status}")

    @activity.defn
    async def set_job_status(self, asked: SetJobStatusInput) -> None:
        """Pause, resume or stop admission; it holds for the next transaction. Idempotent: a status is set, not toggled."""
        await self.rollouts.set_status(asked.job_no, asked.status, asked.phase, asked.reason, asked.actor)

    @activity.defn
    async def adjust_pace(self, asked: AdjustPaceInput) -> None:
        """New cap and pace. Idempotent: values are set, not changed by an amount."""
        await self.rollouts.set_pace(asked.job_no, asked.pace, asked.actor)

    @activity.defn
    async def cancel_running(self, asked: CancelRunningInput) -> None:
        """Cancel devices in progress of a job that admits nobody any more, and tell them. Idempotent: what is over stays."""
        await self._tell(asked.job_no, await self.rollouts.cancel_running(asked.job_no, asked.reason))

    @activity.defn
    async def finish_rollout(self, asked: FinishRolloutInput) -> FinishRolloutResult:
        """Close the job, after a drain where one is asked for. Idempotent: each step finds what is left to do.

        With `drain`, what has not started is withdrawn at once, so that those devices are free for another rollout;
        devices that update are waited for until they have reported or run out of time.
        """
        if asked.drain:
            await self.rollouts.withdraw(asked.job_no, asked.reason)
            await self._tell_withdrawn(asked.job_no)
            await self._drain(asked.job_no)
        await Examiner(asked.job_no, self.rollouts, self.flows).look()
        return await self.rollouts.finish(asked.job_no, asked.outcome, asked.reason)

    async def _tell_withdrawn(self, job_no: int) -> None:
        await self._tell(job_no, await self.rollouts.withdrawn(job_no))

    async def _tell(self, job_no: int, devices: Sequence[str]) -> None:
        try:
            for position, device in enumerate(devices):
                if position % BATCH_OF_NOTICES == 0:
                    _stop_with_the_worker()
                    activity.heartbeat()
                for topic, payload in withdrawn_notices(device, int(time.time())):
                    await self.publisher.publish(topic, payload)
        except (UnavailableError, OSError) as error:
            log.warning("devices not told of a withdrawal", job_no=job_no, devices=len(devices), error=str(error))

    async def _drain(self, job_no: int) -> None:
        while await self.rollouts.in_flight(job_no):
            _stop_with_the_worker()
            activity.heartbeat()
            await self.rollouts.sweep(job_no)
            await asyncio.sleep(DRAIN_EVERY.total_seconds())


def _beat(shown: DriveHeartbeat) -> None:
    _stop_with_the_worker()
    activity.heartbeat(shown)


def _stop_with_the_worker() -> None:
    """End an activity that may last for days when its worker ends, so that another takes over at once."""
    if activity.is_worker_shutdown():
        raise ApplicationError(
            "this worker shuts down; another one goes on",
            type="WorkerShutdown",
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=timedelta(milliseconds=100),
        )
