"""Driving a wave: the loop behind the activity `drive_wave`.

It resumes from PostgreSQL alone. A driver that is killed between any two of its steps is replaced by one that looks,
and goes on: opening an open wave does nothing, a verdict that is recorded is returned, hints are sent once too often.
Two drivers of the same wave, one of them not yet aware that it was cancelled, do each other no harm.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from activities.examining import Examiner
from activities.hinting import Hinter
from activities.rollout_records import RolloutRecords
from domain.verdicts import OVER, drive_verdict, is_continuous
from models.rollout import (
    DriveHeartbeat,
    DriveMode,
    DriveWaveInput,
    DriveWaveResult,
    JobProgress,
    JobStatus,
    Verdict,
    WaveStatus,
    WaveVerdict,
)

SWEEP_EVERY = timedelta(seconds=1)
"""Deadlines are minutes to days long; a second late is soon enough, and a sweep is a query."""

JOIN_EVERY = timedelta(seconds=10)
"""A device that comes to match a continuous job is part of it within this; looking is a scan of the registry."""

BEAT_EVERY = timedelta(seconds=1)
"""Well within the heartbeat timeout."""

BUSY_WAIT = timedelta(milliseconds=50)
"""Between two looks while hints bring admissions: a slot that becomes free is offered again within this."""

WORKING_WAIT = timedelta(milliseconds=200)
"""Between two looks while devices update: bounds the delay of a verdict whose notification was missed."""

IDLE_WAIT = timedelta(seconds=1)
"""Between two looks while nothing happens: one query a second for a rollout that waits for days."""

QUIET_AFTER = timedelta(seconds=10)
"""Without any change for this long nothing is expected to happen at once."""


@dataclass
class WaveDriver:
    """See the module.

    Attributes:
        examiner: asks devices that failed how they are.
        beat: called about every BEAT_EVERY with what to show; raises when this driver is to stop.
    """

    asked: DriveWaveInput
    records: RolloutRecords
    hinter: Hinter
    beat: Callable[[DriveHeartbeat], None]
    clock: Callable[[], float] = time.monotonic
    examiner: Examiner | None = None
    join_every: timedelta = JOIN_EVERY
    _join_at: float = 0.0
    _examining: asyncio.Task[int] | None = None

    async def drive(self) -> DriveWaveResult:
        """Drive until the verdict is not CONTINUE."""
        try:
            return await self._drive()
        finally:
            if self._examining is not None:
                self._examining.cancel()
                await asyncio.gather(self._examining, return_exceptions=True)

    async def _drive(self) -> DriveWaveResult:
        asked, sweep_at, beat_at = self.asked, 0.0, 0.0
        counts, changed_at = None, self.clock()
        if asked.phase is not None:
            await self.records.set_phase(asked.job_no, asked.phase, asked.phase_reason)
        while True:
            if self.clock() >= sweep_at:
                await self.records.sweep(asked.job_no)
                sweep_at = self.clock() + SWEEP_EVERY.total_seconds()
            await self._join()
            seen = await self.records.progress(asked.job_no, asked.wave)
            if self._is_to_open(seen):
                await self.records.open_wave(asked.job_no, asked.wave)
                continue
            self._examine(seen)
            verdict = drive_verdict(asked, seen)
            if verdict.verdict is not Verdict.CONTINUE:
                return await self._end(verdict, seen)
            if seen.wave.counts != counts:
                counts, changed_at = seen.wave.counts, self.clock()
            quiet = self.clock() - changed_at > QUIET_AFTER.total_seconds()
            sent = await self.hinter.tick(seen, asked.job_no)
            if self.clock() >= beat_at:
                self.beat(self._shown(seen))
                beat_at = self.clock() + BEAT_EVERY.total_seconds()
            await self.records.wait_for_change(asked.job_no, _patience(seen, sent, quiet).total_seconds())

    def _examine(self, seen: JobProgress) -> None:
        """Beside the driving: no wave waits for questions to devices that have failed. What is left at its end is asked
        by the next wave's driver, or as the job is closed."""
        if self.examiner is not None and (self._examining is None or self._examining.done()):
            counts = seen.wave.counts
            failed = counts.failed + counts.rejected + counts.timed_out
            self._examining = asyncio.create_task(self.examiner.look(failed))

    async def _join(self) -> None:
        """Take in devices that match by now. Whoever drives does it: one that is killed leaves nothing half done."""
        if not is_continuous(self.asked.spec) or self.clock() < self._join_at:
            return
        if await self.records.join(self.asked.job_no):
            self.hinter.wake(self.asked.wave)
        self._join_at = self.clock() + self.join_every.total_seconds()

    def _is_to_open(self, seen: JobProgress) -> bool:
        """A wave is opened by its own driver, which saves a step between two waves; never while the job is paused."""
        return (
            self.asked.mode is DriveMode.ANSWERING
            and seen.wave.status is WaveStatus.PENDING
            and seen.tripped_wave is None
            and seen.job_status in (JobStatus.PLANNED, JobStatus.RUNNING)
        )

    async def _end(self, verdict: WaveVerdict, seen: JobProgress) -> DriveWaveResult:
        asked, wave = self.asked, seen.wave
        soak_first = asked.mode is DriveMode.ANSWERING and asked.soaks and verdict.verdict is Verdict.PROMOTE
        recorded = wave.verdict is verdict.verdict and wave.reason == verdict.reason
        stopped_by_others = seen.job_status in OVER and seen.tripped_wave is None
        if not soak_first and not recorded and not stopped_by_others:
            wave = await self.records.close_wave(asked.job_no, asked.wave, verdict)
            if wave.tripped and verdict.verdict is not Verdict.HALT:
                # The breaker tripped between the look and the lock: what it says comes first.
                verdict = drive_verdict(asked, seen.model_copy(update={"wave": wave}))
                wave = await self.records.close_wave(asked.job_no, asked.wave, verdict)
        return DriveWaveResult(verdict=verdict, progress=wave)

    def _shown(self, seen: JobProgress) -> DriveHeartbeat:
        counts = seen.wave.counts
        return DriveHeartbeat(
            wave=seen.wave.wave,
            mode=self.asked.mode,
            answered=counts.answered,
            failed=counts.gate_failed,
            in_progress=counts.in_progress,
            outstanding=counts.outstanding,
            hints_sent=self.hinter.sent,
        )


def _patience(seen: JobProgress, sent: int, quiet: bool) -> timedelta:
    if sent:
        return BUSY_WAIT
    if seen.in_flight:
        return BUSY_WAIT if seen.in_flight >= seen.in_flight_cap and seen.wave.counts.queued else WORKING_WAIT
    return IDLE_WAIT if quiet else WORKING_WAIT
