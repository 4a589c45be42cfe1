"""Caps, the breaker and counters on a real PostgreSQL, with many transactions at once."""

import asyncio
import random
from datetime import timedelta

import pytest

import domain.admission
from domain.admission import Ledger
from domain.ledger_rows import Report
from models.errors import ConflictError, NotFoundError, RefusedError
from models.protocol import ExecutionState
from models.rollout import JobStatus, Outcome, Phase, PlanRolloutInput, Verdict, WaveVerdict
from models.spec import PaceSpec
from store.engine import Database
from store.executions import ExecutionStore
from tests.integration.rollout_setup import NEW, add_devices, prepare, recount, specification

SUCCESS = {"version": "1.3.0", "sha256": NEW, "slot": "b", "via": "delta"}
FAILURE = {"failure": "rolled-back", "reason": "fell back"}
JOB = "motor-1_3_0"


async def ask(store: ExecutionStore, thing: str) -> bool:
    """One device asks to start, in a transaction of its own."""
    async with store.batch([thing]) as batch:
        pending = batch.ledger.pending_of(thing)
        return bool(pending) and batch.ledger.admit(pending[0], batch.now, {"step": "accepted"}) is None


async def tell(store: ExecutionStore, thing: str, state: ExecutionState, details: dict[str, str]) -> bool:
    """One device reports, in a transaction of its own."""
    async with store.batch([thing], [(JOB, thing)]) as batch:
        return batch.ledger.report(batch.ledger.find(JOB, thing), Report(state, details), batch.now) is None


def things(count: int) -> list[str]:
    return [f"motor-{i}" for i in range(1, count + 1)]


async def storm_of_fifty(db: Database, devices: int) -> int:
    """Fifty clients on connections of their own ask for random devices, while ten of those admitted fail early on.

    Returns how many executions became IN_PROGRESS after the crossing had committed, by PostgreSQL's own clock.
    """
    store, rng, names = ExecutionStore(db), random.Random(7), things(devices)
    rng.shuffle(names)

    async def device(name: str) -> None:
        if await ask(store, name):
            await tell(store, name, ExecutionState.FAILED, FAILURE)

    waiting = iter(names)

    async def client() -> None:
        for name in waiting:
            await device(name)

    await asyncio.gather(*(client() for _ in range(50)))
    async with db.pool.connection() as connection:
        row = await (
            await connection.execute(
                "SELECT count(*) FROM executions e JOIN waves w USING (job_no, wave) WHERE e.started_at > w.tripped_at"
            )
        ).fetchone()
    assert row is not None
    return int(row[0])


async def test_after_the_crossing_no_execution_starts_with_fifty_devices_asking_at_once(db: Database) -> None:
    fleet = await prepare(db, 400, pace={"in_flight": 10, "per_minute": None})
    assert await storm_of_fifty(db, 400) == 0
    progress = await fleet.store.progress(fleet.plan.job_no, 1)
    assert progress.wave.tripped and progress.wave.tripped_failed == 5
    assert 5 <= progress.exposed <= 5 + 9
    assert await recount(db, fleet.plan.job_no) == []


async def test_without_the_breaker_in_admission_the_storm_goes_on(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Ledger.why_not

    def blind(self: Ledger, execution: domain.admission.ExecutionRow, now: float) -> str | None:
        refused = original(self, execution, now)
        return None if refused and "breaker" in refused else refused

    monkeypatch.setattr(Ledger, "why_not", blind)
    await prepare(db, 100, pace={"in_flight": 10, "per_minute": None})
    assert await storm_of_fifty(db, 100) > 0


async def test_the_in_flight_cap_is_never_exceeded_under_a_storm(db: Database) -> None:
    fleet = await prepare(db, 300, pace={"in_flight": 7, "per_minute": None})
    store, highest, done = ExecutionStore(db), 0, asyncio.Event()

    async def watch() -> None:
        nonlocal highest
        while not done.is_set():
            async with db.pool.connection() as connection:
                row = await (
                    await connection.execute("SELECT count(*) FROM executions WHERE state = 'IN_PROGRESS'")
                ).fetchone()
            assert row is not None
            highest = max(highest, row[0])

    watcher = asyncio.create_task(watch())
    waiting = set(things(300))

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        while waiting:
            name = rng.choice(sorted(waiting))
            if await ask(store, name):
                waiting.discard(name)
                await tell(store, name, ExecutionState.SUCCEEDED, SUCCESS)

    await asyncio.gather(*(client(seed) for seed in range(50)))
    done.set()
    await watcher
    assert highest == 7
    final = await fleet.store.progress(fleet.plan.job_no, 1)
    assert (final.wave.counts.succeeded, final.in_flight, final.exposed) == (300, 0, 300)


async def test_two_thousand_concurrent_reports_leave_counters_equal_to_a_recount(db: Database) -> None:
    fleet = await prepare(db, 500, gate={"healthy": "40%", "limit": "60%"})
    store, rng = ExecutionStore(db), random.Random(3)
    slots = asyncio.Semaphore(50)

    async def device(name: str) -> None:
        reports = [
            (ExecutionState.IN_PROGRESS, {"step": "installing"}),
            (ExecutionState.IN_PROGRESS, {"step": "confirming"}),
            rng.choice([(ExecutionState.SUCCEEDED, SUCCESS), (ExecutionState.FAILED, FAILURE)]),
        ]
        async with slots:
            await ask(store, name)
        for state, details in [*reports, reports[-1]]:  # the last one twice: a duplicate changes nothing
            async with slots:
                await tell(store, name, state, details)

    await asyncio.gather(*(device(name) for name in things(500)))
    assert await recount(db, fleet.plan.job_no) == []
    counts = (await fleet.store.progress(fleet.plan.job_no, 1)).wave.counts
    assert counts.terminal == 500 and counts.answered == 500 and counts.succeeded > 150 < counts.failed


async def test_the_pace_per_minute_is_kept(db: Database) -> None:
    await prepare(db, 50, pace={"in_flight": 500, "per_minute": 20})
    store = ExecutionStore(db)
    admitted = await asyncio.gather(*(ask(store, name) for name in things(50)))
    assert sum(admitted) == 20


async def test_a_success_that_runs_something_else_is_a_failure(db: Database) -> None:
    fleet = await prepare(db, 2)
    store = ExecutionStore(db)
    for name in things(2):
        assert await ask(store, name)
    assert await tell(store, "motor-1", ExecutionState.SUCCEEDED, SUCCESS)
    assert await tell(store, "motor-2", ExecutionState.SUCCEEDED, {**SUCCESS, "sha256": "0" * 64})
    liar = await fleet.store.execution("motor-1.3.0", "motor-2")
    assert liar.state is ExecutionState.FAILED and liar.failure_class == "verify"
    assert (await fleet.store.progress(fleet.plan.job_no, 1)).wave.counts.gate_failed == 1


async def test_a_silent_device_times_out_as_a_failure_and_one_that_never_asked_does_not(db: Database) -> None:
    fleet = await prepare(db, 3, deadlines={"accept": "1ms", "download": "1ms", "install": "1m", "confirm": "1m"})
    store = ExecutionStore(db)
    assert await ask(store, "motor-1")
    await asyncio.sleep(0.05)
    assert await fleet.store.sweep(fleet.plan.job_no) == 3
    counts = (await fleet.store.progress(fleet.plan.job_no, 1)).wave.counts
    assert (counts.timed_out, counts.gate_failed, counts.answered) == (3, 1, 1)
    assert (await fleet.store.execution("motor-1.3.0", "motor-1")).failure_class == "silent"
    assert await recount(db, fleet.plan.job_no) == []


async def test_a_paused_job_admits_nobody_and_goes_on_when_resumed(db: Database) -> None:
    fleet = await prepare(db, 2)
    store, job_no = ExecutionStore(db), fleet.plan.job_no
    await fleet.store.set_status(job_no, JobStatus.PAUSED, Phase.PAUSED, "lunch", "anna")
    assert not await ask(store, "motor-1")
    await fleet.store.set_status(job_no, JobStatus.RUNNING, Phase.ROLLING, "", "anna")
    assert await ask(store, "motor-1")


async def test_halting_a_wave_withdraws_what_is_queued_and_lets_started_devices_finish(db: Database) -> None:
    fleet = await prepare(db, 10)
    store, job_no = ExecutionStore(db), fleet.plan.job_no
    assert await ask(store, "motor-1")
    await fleet.store.close_wave(job_no, 1, WaveVerdict(verdict=Verdict.HALT, reason="halt: test"))
    assert not await ask(store, "motor-2")
    result = await fleet.store.finish(job_no, Outcome.HALTED, "halt: test")
    assert await fleet.store.finish(job_no, Outcome.HALTED, "halt: test") == result
    assert await tell(store, "motor-1", ExecutionState.SUCCEEDED, SUCCESS)
    counts = (await fleet.store.progress(job_no, 1)).wave.counts
    assert (counts.canceled, counts.succeeded) == (9, 1)
    assert len(await fleet.store.withdrawn(job_no)) == 9
    assert await recount(db, job_no) == []


async def test_a_second_rollout_over_the_same_devices_is_refused_with_count_and_name(db: Database) -> None:
    fleet = await prepare(db, 20)
    other = specification(name="motor-again")
    with pytest.raises(ConflictError, match=r"20 of its 20 devices are held by rollout motor-1\.3\.0"):
        await fleet.store.plan(PlanRolloutInput(spec=other))
    await fleet.store.finish(fleet.plan.job_no, Outcome.ABORTED, "made room")
    assert (await fleet.store.plan(PlanRolloutInput(spec=other))).devices == 20


async def test_two_plans_at_once_over_the_same_devices_leave_exactly_one(db: Database) -> None:
    fleet = await prepare(db, 20)
    await fleet.store.finish(fleet.plan.job_no, Outcome.ABORTED, "made room")
    specs = [specification(name=f"motor-{i}") for i in range(8)]
    results = await asyncio.gather(
        *(fleet.store.plan(PlanRolloutInput(spec=spec)) for spec in specs), return_exceptions=True
    )
    assert sum(isinstance(result, ConflictError) for result in results) == 7


async def test_planning_is_repeatable_and_refuses_what_cannot_be(db: Database) -> None:
    fleet = await prepare(db, 60, waves=[{"name": "canary", "size": "5%"}, {"name": "fleet", "size": "100%"}])
    assert [wave.devices for wave in fleet.plan.waves] == [3, 57]
    assert await fleet.store.plan(PlanRolloutInput(spec=fleet.spec)) == fleet.plan
    with pytest.raises(ConflictError, match="another specification"):
        await fleet.store.plan(PlanRolloutInput(spec=specification()))
    with pytest.raises(NotFoundError, match="release publish"):
        await fleet.store.plan(PlanRolloutInput(spec=specification(name="x", release="motor-controller@9")))
    with pytest.raises(RefusedError, match="no device matches"):
        await fleet.store.plan(PlanRolloutInput(spec=specification(name="x", target={"sites": ["nowhere"]})))
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE devices SET device_type = 'pump' WHERE device_id = 'motor-7'")
    with pytest.raises(RefusedError, match=r"for hardware motor, 1 of 60 targets are pump"):
        await fleet.store.plan(PlanRolloutInput(spec=specification(name="x")))


async def test_the_same_fleet_gives_the_same_canaries(db: Database) -> None:
    waves = [{"name": "canary", "size": "10%"}, {"name": "fleet", "size": "100%"}]
    fleet = await prepare(db, 50, waves=waves)
    first = [e.device_id for e in await fleet.store.executions("motor-1.3.0", limit=5)]
    async with db.pool.connection() as connection:
        await connection.execute("TRUNCATE jobs, waves, executions, devices")
    await add_devices(db, 50)
    await fleet.store.plan(PlanRolloutInput(spec=fleet.spec))
    assert [e.device_id for e in await fleet.store.executions("motor-1.3.0", limit=5)] == first


async def test_a_driver_that_listens_hears_of_the_answered_wave_at_once(db: Database) -> None:
    fleet = await prepare(db, 1)
    store = ExecutionStore(db)
    assert await ask(store, "motor-1")
    listening = asyncio.create_task(fleet.store.wait_for_change(fleet.plan.job_no, 20))
    await asyncio.sleep(0.3)
    assert not listening.done()
    await tell(store, "motor-1", ExecutionState.SUCCEEDED, SUCCESS)
    async with asyncio.timeout(timedelta(seconds=5).total_seconds()):
        assert await listening
    assert not await fleet.store.wait_for_change(fleet.plan.job_no, 0.05)


async def test_a_lower_cap_stops_new_starts_at_once(db: Database) -> None:
    fleet = await prepare(db, 10)
    store = ExecutionStore(db)
    assert await ask(store, "motor-1") and await ask(store, "motor-2")
    await fleet.store.set_pace(fleet.plan.job_no, PaceSpec(in_flight=2, per_minute=None), "anna")
    assert not await ask(store, "motor-3")
    assert await tell(store, "motor-1", ExecutionState.SUCCEEDED, SUCCESS)
    assert await ask(store, "motor-3")
