"""The hinter against a modelled fleet on a virtual clock: is everyone told, and are free slots kept supplied?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from activities.driving import BUSY_WAIT
from activities.hinting import Hinter
from activities.notices import OfferedJob, offer_notices, withdrawn_notices
from models.errors import UnavailableError
from models.rollout import JobProgress, JobStatus, WaveCounts, WaveProgress, WaveStatus

TICK = BUSY_WAIT.total_seconds()


@dataclass
class ModelFleet:
    """Devices that ask `ask` seconds after a hint and update for `takes` seconds; some hear nothing."""

    devices: int
    cap: int = 500
    takes: float = 0.3
    ask: float = 0.01
    deaf: frozenset[str] = frozenset()
    loses: int = 0
    """So many of the first hints are lost on their way."""
    per_minute: int | None = None
    status: JobStatus = JobStatus.RUNNING
    now: float = 0.0
    exposed: int = 0
    done: int = 0
    refused: int = 0
    told: int = 0
    down: bool = False
    rank: int = 0
    queued: dict[str, None] = field(default_factory=dict)
    asking: list[tuple[float, str]] = field(default_factory=list)
    ending: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.order = [f"d{n}" for n in range(self.devices)]
        self.queued = dict.fromkeys(self.order)

    async def take_hints(self, job_no: int, wave: int, limit: int) -> Sequence[str]:
        """As the store: in order, queued ones only, behind a cursor."""
        taken: list[str] = []
        while self.rank < self.devices and len(taken) < limit:
            if self.order[self.rank] in self.queued:
                taken.append(self.order[self.rank])
            self.rank += 1
        return taken

    async def rewind_hints(self, job_no: int, wave: int) -> None:
        """From the start."""
        self.rank = 0

    async def publish(self, topic: str, payload: bytes) -> None:
        """A device hears that it may ask."""
        if self.down:
            raise UnavailableError("the broker does not answer")
        if not topic.endswith("/notify-next"):
            return
        device = orjson.loads(payload)["execution"]["thingName"]
        self.told += 1
        if self.loses:
            self.loses -= 1
        elif device not in self.deaf:
            self.asking.append((self.now + self.ask, device))

    def pass_time(self, seconds: float) -> None:
        """Admissions and ends, in small steps."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.005
            self.done += sum(end <= self.now for end in self.ending)
            self.ending = [end for end in self.ending if end > self.now]
            due = [device for at, device in self.asking if at <= self.now]
            self.asking = [(at, device) for at, device in self.asking if at > self.now]
            for device in due:
                recent = sum(start > self.now - 60 for start in self.starts) if self.per_minute else 0
                if len(self.ending) >= self.cap or (self.per_minute and recent >= self.per_minute):
                    self.refused += 1
                elif device in self.queued:
                    del self.queued[device]
                    self.exposed += 1
                    self.starts.append(self.now)
                    self.ending.append(self.now + self.takes)

    def seen(self) -> JobProgress:
        """What the driver reads."""
        counts = WaveCounts(queued=len(self.queued), in_progress=len(self.ending), succeeded=self.done)
        wave = WaveProgress(wave=1, name="all", status=WaveStatus.OPEN, counts=counts, target_count=self.devices)
        return JobProgress(
            wave=wave,
            job_status=self.status,
            job_id="motor-1_3_0",
            in_flight=len(self.ending),
            in_flight_cap=self.cap,
            per_minute=self.per_minute,
            exposed=self.exposed,
        )

    async def run(self, seconds: float, hinter: Hinter | None = None) -> Hinter:
        """Tick as a busy driver does, until all is done or the time is over."""
        hinter = hinter or self.hinter()
        until = self.now + seconds
        while self.now < until and self.done < self.devices:
            await hinter.tick(self.seen(), 7)
            self.pass_time(TICK)
        return hinter

    def hinter(self) -> Hinter:
        """One on this clock."""
        records: Any = self
        return Hinter(records, self, clock=lambda: self.now, wall=lambda: 1_767_225_600.0)


async def test_a_thousand_devices_a_second_are_supplied_and_nobody_is_told_in_vain() -> None:
    fleet = ModelFleet(5000, cap=500, takes=0.3)
    await fleet.run(60)
    assert fleet.done == 5000
    assert fleet.now < 5.0, "the hinter did not keep up with 1,000 devices a second"
    assert fleet.refused == 0
    assert fleet.told == 5000


async def test_hints_that_are_lost_are_sent_again() -> None:
    fleet = ModelFleet(300, cap=50, loses=60)
    await fleet.run(60)
    assert fleet.done == 300


async def test_devices_that_hear_nothing_do_not_keep_the_others_waiting_for_ever() -> None:
    fleet = ModelFleet(400, cap=20, deaf=frozenset(f"d{n}" for n in range(0, 400, 2)))
    await fleet.run(120)
    assert fleet.done == 200
    told = fleet.told
    await fleet.run(600)
    assert fleet.told - told < 200 * 12, "devices that are away are told ever more rarely"


async def test_the_pace_per_minute_is_kept_without_refusals() -> None:
    fleet = ModelFleet(100, cap=500, per_minute=30)
    await fleet.run(150)
    assert fleet.refused == 0
    assert 80 <= fleet.done <= 100


@pytest.mark.parametrize("status", [JobStatus.PAUSED, JobStatus.HALTED, JobStatus.PLANNED, JobStatus.FINISHED])
async def test_only_a_running_job_is_announced(status: JobStatus) -> None:
    fleet = ModelFleet(50, status=status)
    await fleet.run(5)
    assert fleet.told == 0


async def test_a_broker_that_is_away_is_not_an_error_and_everyone_is_told_when_it_is_back() -> None:
    fleet = ModelFleet(40, down=True)
    hinter = await fleet.run(3)
    assert fleet.done == 0
    fleet.down = False
    await fleet.run(30, hinter)
    assert fleet.done == 40


def test_notices_have_the_shapes_that_aws_iot_jobs_gives_them() -> None:
    notify, head = offer_notices(["motor-7"], OfferedJob("motor-1_3_0", queued_at=100), at=105)
    summary = {"jobId": "motor-1_3_0", "queuedAt": 100, "lastUpdatedAt": 100, "versionNumber": 1, "executionNumber": 1}
    assert notify[0] == "$aws/things/motor-7/jobs/notify"
    assert orjson.loads(notify[1]) == {"timestamp": 105, "jobs": {"QUEUED": [summary]}}
    assert head[0] == "$aws/things/motor-7/jobs/notify-next"
    execution = {**summary, "thingName": "motor-7", "status": "QUEUED"}
    assert orjson.loads(head[1]) == {"timestamp": 105, "execution": execution}
    assert [orjson.loads(payload) for _, payload in withdrawn_notices("motor-7", 105)] == [
        {"timestamp": 105, "jobs": {}},
        {"timestamp": 105},
    ]


@dataclass
class RetryingFleet:
    """Devices of which some wait for their next attempt: what a Hinter reads, and whom it tells."""

    due: list[tuple[float, str, int]]
    fresh: list[str] = field(default_factory=list)
    cap: int = 100
    now: float = 1000.0
    told: list[tuple[str, int]] = field(default_factory=list)

    async def take_hints(self, job_no: int, wave: int, limit: int) -> list[str]:
        taken, self.fresh = self.fresh[:limit], self.fresh[limit:]
        return taken

    async def take_due_retries(
        self, job_no: int, wave: int, after: tuple[float, str], limit: int
    ) -> list[tuple[float, str, int]]:
        return [row for row in sorted(self.due) if row[:2] > after and row[0] <= self.now][:limit]

    async def rewind_hints(self, job_no: int, wave: int) -> None:
        """Nobody is left to tell again."""

    async def progress(self, job_no: int, wave: int) -> JobProgress:
        return self.seen(wave)

    async def publish(self, topic: str, payload: bytes) -> None:
        if topic.endswith("/notify-next"):
            execution = orjson.loads(payload)["execution"]
            self.told.append((execution["thingName"], execution["executionNumber"]))

    def seen(self, wave: int = 1, driven: int = 1) -> JobProgress:
        counts = WaveCounts(queued=10, retrying=len(self.due)) if wave == 1 else WaveCounts(queued=1)
        shown = WaveProgress(wave=wave, name="all", status=WaveStatus.OPEN, counts=counts)
        return JobProgress(
            wave=shown, job_status=JobStatus.RUNNING, in_flight_cap=self.cap, retrying=len(self.due), job_id="_try"
        )

    def hinter(self) -> Hinter:
        records: Any = self
        return Hinter(records, self, clock=lambda: self.now, wall=lambda: 1_767_225_600.0)


async def test_a_device_is_told_when_its_next_attempt_is_due_and_which_one_it_is() -> None:
    fleet = RetryingFleet(due=[(1003.0, "d1", 2), (1003.0, "d2", 3), (1009.0, "d3", 2)])
    hinter = fleet.hinter()
    for moment in range(1000, 1013):
        fleet.now = float(moment)
        await hinter.tick(fleet.seen(), 7)
        assert ("d1", 2) not in fleet.told or moment >= 1003
    assert sorted(fleet.told) == [("d1", 2), ("d2", 3), ("d3", 2)], "each once, although the round rests meanwhile"


async def test_no_more_are_told_of_their_next_attempt_than_can_begin() -> None:
    fleet = RetryingFleet(due=[(900.0, f"d{n}", 2) for n in range(10)], cap=4)
    hinter = fleet.hinter()
    await hinter.tick(fleet.seen(), 7)
    await hinter.tick(fleet.seen(), 7)
    assert len(fleet.told) == 4


async def test_next_attempts_in_an_earlier_wave_do_not_wait_for_the_look_at_stragglers() -> None:
    fleet = RetryingFleet(due=[(1001.0, "d1", 2)])
    hinter = fleet.hinter()
    for moment in (1000.0, 1001.0, 1002.5):
        fleet.now = moment
        await hinter.tick(fleet.seen(wave=2), 7)
    assert fleet.told == [("d1", 2)]


async def test_devices_that_join_are_told_although_the_round_rests() -> None:
    fleet = RetryingFleet(due=[])
    hinter = fleet.hinter()
    for _ in range(8):
        fleet.now += 0.5
        await hinter.tick(fleet.seen(), 7)
    fleet.fresh = ["late-1"]
    await hinter.tick(fleet.seen(), 7)
    before = list(fleet.told)
    hinter.wake(1)
    await hinter.tick(fleet.seen(), 7)
    assert (before, fleet.told) == ([], [("late-1", 1)])
