"""Telling devices that an update waits for them, at the pace at which they can be admitted.

One `Hinter` belongs to one run of one driver. Its memory (hints sent, admissions seen, when to repeat) is lost with the
process and nothing depends on it: a driver that starts anew tells a few devices twice.

The wave itself is served on every tick. Waves before it, which stay open, are looked at now and then for devices that
missed their hint.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import structlog
from prometheus_client import Counter

from activities.notices import OfferedJob, offer_notices
from activities.rollout_records import NoticePublisher, RolloutRecords
from domain.hints import HINT_LIFETIME, PACE_WINDOW, HintNeeds, hints_to_send, next_repeat
from models.errors import UnavailableError
from models.rollout import JobProgress, JobStatus, WaveStatus

STRAGGLERS_EVERY = timedelta(seconds=30)
"""How often earlier waves are looked at."""

RETRIES_EVERY = timedelta(seconds=1)
"""The same while devices of an earlier wave wait for their next attempt."""

HINTS = Counter("tidegate_hints", "Devices told that an update waits for them.")
HINTS_LOST = Counter("tidegate_hints_lost", "Devices that could not be told, because the broker did not answer.")

log = structlog.get_logger()


@dataclass
class _Pass:
    """One round of telling everyone of a wave; between two rounds it rests."""

    rests_until: float = 0.0
    resting: bool = False
    repeat: timedelta = field(default_factory=timedelta)
    exposed: int = 0

    def end(self, now: float, exposed: int) -> None:
        """Everyone has been told."""
        self.repeat = next_repeat(self.repeat, admitted_since=exposed - self.exposed)
        self.rests_until, self.resting, self.exposed = now + self.repeat.total_seconds(), True, exposed


class _Window:
    """Numbers with their time, and their sum over the last while."""

    def __init__(self, length: timedelta) -> None:
        self._length = length.total_seconds()
        self._entries: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, now: float, number: int) -> None:
        """Remember."""
        if number:
            self._entries.append((now, number))
            self._sum += number

    def sum(self, now: float) -> int:
        """What was added within the window before `now`."""
        while self._entries and self._entries[0][0] <= now - self._length:
            self._sum -= self._entries.popleft()[1]
        return self._sum


class Hinter:
    """See the module. `clock` is monotonic seconds, `wall` epoch seconds; tests give their own."""

    def __init__(
        self,
        records: RolloutRecords,
        publisher: NoticePublisher,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.sent = 0
        self._records, self._publisher, self._clock, self._wall = records, publisher, clock, wall
        self._hinted = _Window(HINT_LIFETIME)
        self._admitted = _Window(HINT_LIFETIME)
        self._paced = _Window(PACE_WINDOW)
        self._exposed: int | None = None
        self._passes: dict[int, _Pass] = {}
        self._retries: dict[int, tuple[float, str]] = {}
        """The last next attempt, by wave, that its device was told of when it became due."""
        self._looked_back_at = clock()

    async def tick(self, seen: JobProgress, job_no: int) -> int:
        """Send the hints that are due now. Returns how many devices were told."""
        now = self._clock()
        self._note_admissions(seen, now)
        if seen.job_status is not JobStatus.RUNNING:
            return 0
        sent = await self._serve(seen, job_no, now)
        every = RETRIES_EVERY if seen.retrying > seen.wave.counts.retrying else STRAGGLERS_EVERY
        if now >= self._looked_back_at + every.total_seconds():
            self._looked_back_at = now
            for wave in range(1, seen.wave.wave):
                sent += await self._serve(await self._records.progress(job_no, wave), job_no, now)
        return sent

    def _note_admissions(self, seen: JobProgress, now: float) -> None:
        admitted = 0 if self._exposed is None else max(0, seen.exposed - self._exposed)
        self._exposed = seen.exposed
        self._admitted.add(now, admitted)
        self._paced.add(now, admitted)

    async def _serve(self, seen: JobProgress, job_no: int, now: float) -> int:
        """Hints for one wave."""
        wave = seen.wave
        round_ = self._passes.setdefault(wave.wave, _Pass(exposed=seen.exposed))
        if wave.status is not WaveStatus.OPEN:
            return 0
        told = await self._serve_retries(seen, job_no, now) if wave.counts.retrying else 0
        if round_.resting and now < round_.rests_until:
            return told
        return told + await self._serve_fresh(seen, job_no, now, round_)

    def _wanted(self, seen: JobProgress, now: float) -> int:
        return hints_to_send(
            HintNeeds(
                cap=seen.in_flight_cap,
                in_flight=seen.in_flight,
                hinted=self._hinted.sum(now),
                admitted=self._admitted.sum(now),
                queued=seen.wave.counts.queued,
                per_minute=seen.per_minute,
                admitted_in_window=self._paced.sum(now),
            )
        )

    def wake(self, wave: int) -> None:
        """Devices have joined this wave: go on with the round that has ended, without a rest."""
        if (round_ := self._passes.get(wave)) is not None:
            round_.resting = False

    async def _serve_retries(self, seen: JobProgress, job_no: int, now: float) -> int:
        """Tell devices whose next attempt has just become due. One that is not heard is told again in a later round."""
        wave, wanted = seen.wave.wave, self._wanted(seen, now)
        if not wanted:
            return 0
        due = await self._records.take_due_retries(job_no, wave, self._retries.get(wave, (0.0, "")), wanted)
        if due:
            self._retries[wave] = due[-1][:2]
            for attempt in sorted({attempt for *_, attempt in due}):
                await self._tell([device for _, device, number in due if number == attempt], seen, attempt)
            self._hinted.add(now, len(due))
        return len(due)

    async def _serve_fresh(self, seen: JobProgress, job_no: int, now: float, round_: _Pass) -> int:
        wave, wanted = seen.wave, self._wanted(seen, now)
        if not wanted:
            return 0
        if round_.resting:
            await self._records.rewind_hints(job_no, wave.wave)
            round_.resting = False
        devices = list(await self._records.take_hints(job_no, wave.wave, wanted))
        if len(devices) < wanted:
            round_.end(now, seen.exposed)
        await self._tell(devices, seen)
        self._hinted.add(now, len(devices))
        return len(devices)

    async def _tell(self, devices: list[str], seen: JobProgress, attempt: int = 1) -> None:
        now = int(self._wall())
        opened = int(seen.wave.opened_at.timestamp()) if seen.wave.opened_at else now
        try:
            for topic, payload in offer_notices(
                devices, OfferedJob(seen.job_id, queued_at=opened, execution_number=attempt), now
            ):
                await self._publisher.publish(topic, payload)
        except (UnavailableError, OSError) as error:
            # They are told again in the next round; a rollout does not fail because the broker is away.
            HINTS_LOST.inc(len(devices))
            log.warning("hints not sent", job_id=seen.job_id, devices=len(devices), error=str(error))
            return
        self.sent += len(devices)
        HINTS.inc(len(devices))
