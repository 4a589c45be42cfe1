"""The storm of test_store_admission through the whole path: a real broker, the gateway's batches, a real PostgreSQL."""

import asyncio
import random
from typing import Any

import pytest

import domain.admission
from domain.admission import Ledger
from store.engine import Database
from tests.conftest import Broker
from tests.integration.rollout_setup import NEW, prepare, recount
from tests.integration.test_gateway_jobs import JOB, Door, open_door

FAILURE = {"status": "FAILED", "statusDetails": {"failure": "rolled-back", "reason": "fell back"}}
SUCCESS = {"status": "SUCCEEDED", "statusDetails": {"version": "1.3.0", "sha256": NEW, "slot": "b"}}
STEPS = ({"step": "installing"}, {"step": "confirming"})


async def start(door: Door, thing: str) -> bool:
    _, answer = await door.ask(thing, "start-next")
    return "execution" in answer


async def fifty_at_once(devices: int, life: Any) -> None:
    """Fifty clients take devices from one list until it is empty."""
    names = [f"motor-{i}" for i in range(1, devices + 1)]
    random.Random(7).shuffle(names)
    waiting = iter(names)

    async def client() -> None:
        for name in waiting:
            await life(name)

    await asyncio.gather(*(client() for _ in range(50)))


async def started_after_the_crossing(db: Database) -> int:
    async with db.pool.connection() as connection:
        cursor = await connection.execute(
            "SELECT count(*) FROM executions e JOIN waves w USING (job_no, wave) WHERE e.started_at > w.tripped_at"
        )
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def fail_until_nobody_starts(door: Door, devices: int) -> None:
    async def life(thing: str) -> None:
        if await start(door, thing):
            await door.ask(thing, JOB, "update", **FAILURE)

    await fifty_at_once(devices, life)


async def test_no_device_starts_after_the_crossing_with_fifty_asking_through_the_broker(
    db: Database, broker: Broker
) -> None:
    fleet = await prepare(db, 400, pace={"in_flight": 10, "per_minute": None})
    async with open_door(db, broker, fleet) as door:
        await fail_until_nobody_starts(door, 400)
    progress = await fleet.store.progress(fleet.plan.job_no, 1)
    assert progress.wave.tripped and 5 <= progress.exposed <= 5 + 10
    assert await started_after_the_crossing(db) == 0
    assert await recount(db, fleet.plan.job_no) == []


async def test_without_the_breaker_in_admission_devices_go_on_starting(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Ledger.why_not

    def blind(self: Ledger, execution: domain.admission.ExecutionRow, now: float) -> str | None:
        refused = original(self, execution, now)
        return None if refused and "breaker" in refused else refused

    monkeypatch.setattr(Ledger, "why_not", blind)
    fleet = await prepare(db, 100, pace={"in_flight": 10, "per_minute": None})
    async with open_door(db, broker, fleet) as door:
        await fail_until_nobody_starts(door, 100)
    assert await started_after_the_crossing(db) > 0


async def test_the_cap_holds_and_two_thousand_reports_are_counted_exactly_through_the_broker(
    db: Database, broker: Broker
) -> None:
    fleet = await prepare(db, 500, pace={"in_flight": 7, "per_minute": None}, gate={"healthy": "40%", "limit": "60%"})
    highest, over = 0, asyncio.Event()

    async def watch() -> None:
        nonlocal highest
        while not over.is_set():
            async with db.pool.connection() as connection:
                cursor = await connection.execute("SELECT count(*) FROM executions WHERE state = 'IN_PROGRESS'")
                row = await cursor.fetchone()
            assert row is not None
            highest = max(highest, row[0])

    async with open_door(db, broker, fleet) as door:

        async def life(thing: str) -> None:
            while not await start(door, thing):
                await asyncio.sleep(0.01)
            for details in STEPS:
                await door.ask(thing, JOB, "update", status="IN_PROGRESS", statusDetails=details)
            end = FAILURE if int(thing.split("-")[1]) % 5 == 0 else SUCCESS
            first, again = await asyncio.gather(*(door.ask(thing, JOB, "update", **end) for _ in range(2)))
            assert sorted([first[0], again[0]]) == [False, True], "a report that comes twice counts once"

        watching = asyncio.create_task(watch())
        await fifty_at_once(500, life)
        over.set()
        await watching
    assert highest == 7
    counts = (await fleet.store.progress(fleet.plan.job_no, 1)).wave.counts
    assert (counts.succeeded, counts.failed) == (400, 100)
    assert await recount(db, fleet.plan.job_no) == []
