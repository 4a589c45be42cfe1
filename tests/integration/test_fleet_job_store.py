"""Fleet jobs in a real PostgreSQL: who is chosen, who joins, what is wanted and asked of devices, what is shown."""

import asyncio
import random
from typing import Any

import pytest

import store.jobplanning
from domain.admission import Ledger
from domain.configurations import ConfigState
from domain.ledger_rows import Report
from firmware.keys import generate_private_key
from models.errors import ConflictError, NotFoundError, RefusedError
from models.fleetjob import PlanFleetJobInput
from models.protocol import ExecutionState, JobOperation
from models.rollout import JobStatus, Outcome, Phase, PlanRolloutInput
from store.configurations import config_state, history, set_desired
from store.engine import Database
from store.executions import ExecutionStore
from store.fleetjobs import FleetJobStore
from store.rollouts import RolloutStore
from tests.integration.jobs_setup import adds_up, job, miscounted, plan_job
from tests.integration.rollout_setup import add_devices, add_release, specification

FAILED = Report(ExecutionState.FAILED, {"failure": "internal", "reason": "no memory"})
SUCCEEDED = Report(ExecutionState.SUCCEEDED, {})
REJECTED = Report(ExecutionState.REJECTED, {"failure": "rejected-by-user"})


async def execute(db: Database, sql: str, *values: Any) -> None:
    async with db.pool.connection() as connection:
        await connection.execute(sql.encode(), values)


async def rows(db: Database, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    async with db.pool.connection() as connection:
        return list(await (await connection.execute(sql.encode(), values)).fetchall())


async def attempt(db: Database, thing: str, job_id: str, report: Report | None) -> bool:
    """A device asks for a job, and reports at once, in one transaction. Whether it was admitted."""
    async with ExecutionStore(db).batch([thing], [(job_id, thing)]) as batch:
        execution = batch.ledger.find(job_id, thing)
        assert execution is not None
        if execution.state is not ExecutionState.QUEUED or batch.ledger.admit(execution, batch.now, None) is not None:
            return False
        if report is not None:
            assert batch.ledger.report(execution, report, batch.now) is None
    return True


async def devices_of(db: Database, job_no: int) -> set[str]:
    return {device for (device,) in await rows(db, "SELECT device_id FROM executions WHERE job_no = %s", job_no)}


async def test_a_job_reaches_whom_its_target_selects_but_nobody_retired_barred_or_unheard_of(db: Database) -> None:
    await add_devices(db, 8)
    await execute(
        db, "UPDATE devices SET tags = '{\"env\": \"lab\"}' WHERE device_id IN ('motor-1','motor-2','motor-3')"
    )
    await execute(db, "UPDATE devices SET status = 'retired' WHERE device_id = 'motor-1'")
    await execute(db, "UPDATE devices SET barred_at = now() WHERE device_id = 'motor-2'")
    await execute(db, "UPDATE devices SET status = 'provisioning' WHERE device_id = 'motor-4'")
    tagged = await plan_job(db, job("tagged", target={"tags": {"env": "lab"}}))
    everyone = await plan_job(db, job("everyone"))
    asked_for = await plan_job(db, job("new-ones", target={"statuses": ["provisioning"]}))
    assert await devices_of(db, tagged.job_no) == {"motor-3"}
    assert await devices_of(db, everyone.job_no) == {f"motor-{i}" for i in (3, 5, 6, 7, 8)}
    assert await devices_of(db, asked_for.job_no) == {"motor-4"}
    with pytest.raises(RefusedError, match="cannot start job none: no device matches the target"):
        await plan_job(db, job("none", target={"type": "pump"}))


async def test_the_same_job_again_is_the_plan_that_exists_and_another_of_its_name_a_conflict(db: Database) -> None:
    await add_devices(db, 3)
    first = await plan_job(db, job())
    await add_devices(db, 2, "pump")
    assert await plan_job(db, job()) == first
    with pytest.raises(ConflictError, match="a job of this name with another specification exists"):
        await plan_job(db, job(max_parallel=3))


async def test_jobs_share_devices_unless_they_install_firmware(db: Database) -> None:
    await add_devices(db, 4)
    await add_release(db, generate_private_key())
    await plan_job(db, job("one"))
    await plan_job(db, job("two"))
    update = job("update", "firmware-update", release="motor-controller@1.3.0")
    await plan_job(db, update)
    async with ExecutionStore(db).batch(["motor-1"]) as batch:
        jobs = [batch.ledger.jobs[e.job_no].job_id for e in batch.ledger.pending_of("motor-1", batch.now)]
    assert sorted(jobs) == ["_one", "_two", "_update"]
    with pytest.raises(ConflictError, match=r"4 of its 4 devices are held by job update"):
        await RolloutStore(db).plan(PlanRolloutInput(spec=specification()))
    with pytest.raises(ConflictError, match=r"the firmware of 4 of its 4 devices is job update's to install"):
        await plan_job(db, update.model_copy(update={"name": "again"}))


async def test_retry_of_takes_exactly_the_devices_that_have_failed(db: Database) -> None:
    await add_devices(db, 6)
    first = await plan_job(db, job("first", "custom"))
    for thing, report in {"motor-1": FAILED, "motor-2": SUCCEEDED, "motor-3": REJECTED, "motor-4": None}.items():
        assert await attempt(db, thing, "_first", report)
    await execute(db, "UPDATE executions SET deadline_at = now() WHERE device_id = 'motor-5'")
    await RolloutStore(db).sweep(first.job_no)
    again = await plan_job(db, job("second", "custom", retry_of="first", target={"type": "no such"}))
    assert await devices_of(db, again.job_no) == {"motor-1", "motor-3", "motor-5"}
    assert (await FleetJobStore(db).get("second")).retry_of == "first"
    with pytest.raises(
        RefusedError, match=r"no device of job second has failed .the job is running., so there is nothing"
    ):
        await plan_job(db, job("third", "custom", retry_of="second"))
    with pytest.raises(NotFoundError, match="no job nobody to retry"):
        await plan_job(db, job("fourth", "custom", retry_of="nobody"))


async def test_attempts_come_after_their_pause_and_every_failure_is_kept(db: Database) -> None:
    await add_devices(db, 2)
    plan = await plan_job(db, job("try", "custom", retry={"max_attempts": 2, "backoff": "1s", "backoff_multiplier": 1}))
    assert await attempt(db, "motor-1", "_try", FAILED)
    assert not await attempt(db, "motor-1", "_try", FAILED), "not at once"
    store, rollouts = FleetJobStore(db), RolloutStore(db)
    [waiting] = await store.executions("try", ExecutionState.QUEUED, 1)
    assert (await store.figures(plan.job_no)).model_dump() == {
        "total": 2, "waiting": 2, "in_progress": 0, "succeeded": 0, "failed": 0, "withdrawn": 0, "retrying": 1,
        "attempts_failed": 1,
    }  # fmt: skip
    assert await rollouts.take_due_retries(plan.job_no, 1, (0.0, ""), 10) == []
    assert await rollouts.take_hints(plan.job_no, 1, 10) == ["motor-2"]
    [failure] = await store.failures("try")
    assert failure.retry_at is not None and (failure.retry_at - failure.failed_at).total_seconds() == pytest.approx(1)
    assert await store.failures("try", only_final=True) == []
    await asyncio.sleep(1.1)
    [(due, thing, number)] = await rollouts.take_due_retries(plan.job_no, 1, (0.0, ""), 10)
    assert (thing, number) == ("motor-1", 2)
    assert await rollouts.take_due_retries(plan.job_no, 1, (due, thing), 10) == [], "told once"
    assert await attempt(db, "motor-1", "_try", FAILED)
    assert [(f.attempt, f.retry_at is None, f.reason) for f in await store.failures("try")] == [
        (2, True, "no memory"),
        (1, False, "no memory"),
    ]
    assert (await store.execution("try", "motor-1")).execution_number == 2
    assert waiting.rollout == "try"
    assert await miscounted(db, plan.job_no) == []


async def test_without_the_bound_on_attempts_a_device_would_be_tried_for_ever(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_devices(db, 1)
    await plan_job(db, job("try", "custom", retry={"max_attempts": 2, "backoff": "0s"}))
    for _ in range(2):
        assert await attempt(db, "motor-1", "_try", FAILED)
    assert not await attempt(db, "motor-1", "_try", FAILED)
    await plan_job(db, job("mutant", "custom", retry={"max_attempts": 20, "backoff": "0s"}))
    for _ in range(5):
        assert await attempt(db, "motor-1", "_mutant", FAILED)


async def test_devices_join_a_continuous_job_once_and_its_counters_follow(db: Database) -> None:
    await add_devices(db, 3)
    continuous = {"membership": "continuous", "target": {"tags": {"env": "lab"}}}
    plan = await plan_job(db, job("always", "custom", **continuous))
    store, jobs = RolloutStore(db), FleetJobStore(db)
    assert (plan.devices, await store.join(plan.job_no)) == (0, 0)
    await execute(db, "UPDATE devices SET tags = '{\"env\": \"lab\"}' WHERE device_id IN ('motor-1','motor-2')")
    assert await store.join(plan.job_no) == 2
    assert await attempt(db, "motor-1", "_always", SUCCEEDED)
    await execute(db, "UPDATE devices SET tags = '{}' WHERE device_id = 'motor-1'")
    assert await store.join(plan.job_no) == 0
    await execute(db, "UPDATE devices SET tags = '{\"env\": \"lab\"}' WHERE device_id IN ('motor-1','motor-3')")
    await execute(db, "UPDATE devices SET barred_at = now() WHERE device_id = 'motor-2'")
    assert await store.join(plan.job_no) == 1, "motor-3; motor-1 has been here before"
    assert await devices_of(db, plan.job_no) == {"motor-1", "motor-2", "motor-3"}
    view = await jobs.get("always")
    assert (view.progress.total, view.progress.succeeded, view.progress.waiting) == (3, 1, 2)
    assert view.continuous and adds_up(view.progress)
    assert await miscounted(db, plan.job_no) == []
    assert (await store.progress(plan.job_no, 1)).outstanding == 2
    assert [event.kind for event in await jobs.events(plan.job_no)] == ["planned", "wave-opened", "joined", "joined"]
    await store.finish(plan.job_no, Outcome.ABORTED, "enough")
    await add_devices(db, 1, "late")
    await execute(db, "UPDATE devices SET tags = '{\"env\": \"lab\"}' WHERE device_id = 'late-1'")
    assert await store.join(plan.job_no) == 0, "it is over"


async def test_devices_that_join_before_the_last_wave_is_open_wait_for_it(db: Database) -> None:
    await add_devices(db, 10)
    waves = [{"name": "first", "size": "50%"}, {"name": "rest", "size": "100%"}]
    plan = await plan_job(db, job("always", "custom", membership="continuous", waves=waves))
    await add_devices(db, 5, "pump")
    assert await RolloutStore(db).join(plan.job_no) == 5
    assert await RolloutStore(db).take_hints(plan.job_no, 2, 100) == []
    progress = await RolloutStore(db).open_wave(plan.job_no, 2)
    assert (progress.counts.queued, progress.target_count) == (10, 10)
    assert len(await RolloutStore(db).take_hints(plan.job_no, 2, 100)) == 10
    assert await miscounted(db, plan.job_no) == []


async def test_joining_beside_fifty_devices_that_ask_and_report_leaves_counters_equal_to_a_recount(
    db: Database,
) -> None:
    await add_devices(db, 200)
    spec = job("always", "custom", membership="continuous", max_parallel=20, retry={"max_attempts": 3, "backoff": "0s"})
    plan = await plan_job(db, spec)
    rng, rollouts, done = random.Random(5), RolloutStore(db), asyncio.Event()

    async def grow() -> int:
        joined = 0
        for batch in range(5):
            await add_devices(db, 20, f"late{batch}")
            joined += sum(await asyncio.gather(rollouts.join(plan.job_no), rollouts.join(plan.job_no)))
        return joined

    async def look() -> None:
        while not done.is_set():
            assert adds_up(await FleetJobStore(db).figures(plan.job_no))

    async def device(thing: str) -> None:
        for _ in range(3):
            await attempt(db, thing, "_always", rng.choice([FAILED, SUCCEEDED]))

    watcher = asyncio.create_task(look())
    joined, *_ = await asyncio.gather(grow(), *(device(f"motor-{i}") for i in range(1, 51)))
    done.set()
    await watcher
    assert joined == 100
    assert await miscounted(db, plan.job_no) == []
    assert (await FleetJobStore(db).figures(plan.job_no)).total == 300


async def test_a_device_whose_firmware_another_job_installs_joins_when_that_is_over(db: Database) -> None:
    await add_devices(db, 2)
    await add_release(db, generate_private_key())
    await plan_job(db, job("first", "firmware-update", release="motor-controller@1.3.0", target={"ids": ["motor-1"]}))
    continuous = job("always", "firmware-update", release="motor-controller@1.3.0", membership="continuous")
    plan = await plan_job(db, continuous)
    store = RolloutStore(db)
    assert (plan.devices, await store.join(plan.job_no)) == (1, 0)
    assert await attempt(db, "motor-1", "_first", REJECTED)
    assert await store.join(plan.job_no) == 1
    assert await miscounted(db, plan.job_no) == []


async def test_config_sync_wants_the_configuration_of_its_devices_and_believes_only_its_version(db: Database) -> None:
    await add_devices(db, 3)
    async with db.pool.connection() as connection:
        await set_desired(connection, "motor-1", {"interval": 5}, "bob")
        await set_desired(connection, "motor-2", {"interval": 9}, "bob")
    plan = await plan_job(db, job("sync", "config-sync", config={"interval": 5}), open_waves=0)
    await RolloutStore(db).open_wave(plan.job_no, 1)
    await RolloutStore(db).open_wave(plan.job_no, 1)
    versions = dict(await rows(db, "SELECT device_id, desired_config_version FROM devices"))
    assert versions == {"motor-1": 1, "motor-2": 2, "motor-3": 1}
    assert await rows(db, "SELECT DISTINCT desired_config FROM devices") == [({"interval": 5},)]
    assert await rows(db, "SELECT actor, reason, count(*) FROM audit_events WHERE actor = 'alice' GROUP BY 1, 2") == [
        ("alice", "job sync", 2)
    ]
    async with db.pool.connection() as connection:
        assert [(v.version, v.actor) for v in await history(connection, "motor-2")] == [(2, "alice"), (1, "bob")]
        assert await config_state(connection, "motor-3") is ConfigState.PENDING
    assert await attempt(db, "motor-2", "_sync", Report(ExecutionState.SUCCEEDED, {"configVersion": "2"}))
    assert await attempt(db, "motor-3", "_sync", Report(ExecutionState.SUCCEEDED, {"configVersion": "0"}))
    store = FleetJobStore(db)
    assert (await store.execution("sync", "motor-2")).state is ExecutionState.SUCCEEDED
    failed = await store.execution("sync", "motor-3")
    assert (failed.state, failed.reason) == (ExecutionState.FAILED, "reported success with configVersion 0, expected 1")


async def test_a_configuration_is_wanted_in_parts_of_the_wave_that_opens_alone(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.jobplanning, "CONFIG_CHUNK", 4)
    await add_devices(db, 20)
    waves = [{"name": "first", "size": "50%"}, {"name": "rest", "size": "100%"}]
    plan = await plan_job(db, job("sync", "config-sync", config={"interval": 5}, waves=waves))
    wanted = await rows(
        db,
        "SELECT e.wave, count(*) FROM executions e JOIN devices d USING (device_id) WHERE d.desired_config_version = 1 "
        "GROUP BY 1",
    )
    assert wanted == [(1, 10)]
    await RolloutStore(db).open_wave(plan.job_no, 2)
    assert await rows(db, "SELECT count(*) FROM devices WHERE desired_config = '{\"interval\": 5}'") == [(20,)]
    assert await rows(db, "SELECT count(*) FROM device_configurations") == [(20,)]


async def test_config_sync_without_a_configuration_is_for_devices_that_have_one_to_take(db: Database) -> None:
    await add_devices(db, 3)
    with pytest.raises(RefusedError, match="has a configuration to take"):
        await plan_job(db, job("sync", "config-sync"))
    async with db.pool.connection() as connection:
        await set_desired(connection, "motor-2", {"interval": 9}, "bob")
    plan = await plan_job(db, job("sync", "config-sync"))
    assert await devices_of(db, plan.job_no) == {"motor-2"}


async def test_a_device_that_begins_a_diagnostic_job_is_asked_and_each_attempt_has_questions_of_its_own(
    db: Database,
) -> None:
    await add_devices(db, 2)
    await plan_job(db, job("look", "diagnostic", retry={"max_attempts": 2, "backoff": "0s"}))
    assert await rows(db, "SELECT count(*) FROM diagnostics") == [(0,)]
    assert await attempt(db, "motor-1", "_look", FAILED)
    assert await attempt(db, "motor-1", "_look", None)
    found = await rows(
        db, "SELECT type, execution_number, state, requested_by, length(request_id) FROM diagnostics ORDER BY 2, 1"
    )
    assert found == [(what, n, "requested", "alice", 32) for n in (1, 2) for what in ("log-tail", "system-info")]


async def test_what_no_attempt_has_answered_is_over_with_its_job(db: Database) -> None:
    await add_devices(db, 2)
    plan = await plan_job(db, job("look", "diagnostic", diagnostics=["ping"]))
    for thing in ("motor-1", "motor-2"):
        assert await attempt(db, thing, "_look", SUCCEEDED)
    await execute(db, "UPDATE diagnostics SET state = 'answered' WHERE device_id = 'motor-1'")
    await RolloutStore(db).finish(plan.job_no, Outcome.SUCCEEDED, "done")
    found = await rows(db, "SELECT device_id, state, error FROM diagnostics ORDER BY 1")
    assert found == [("motor-1", "answered", None), ("motor-2", "timed-out", "its attempt ended without an answer")]


async def test_a_restart_is_believed_when_it_comes_from_another_boot(db: Database) -> None:
    await add_devices(db, 2)
    await execute(
        db,
        "INSERT INTO presence (device_id, last_heartbeat, boot_id) SELECT device_id, now(), 'boot-1' FROM devices",
    )
    await plan_job(db, job())
    for thing in ("motor-1", "motor-2"):
        assert await attempt(db, thing, "_restart-all", None)
    await execute(db, "UPDATE presence SET boot_id = 'boot-2'")
    for thing, boot in {"motor-1": "boot-2", "motor-2": "boot-1"}.items():
        async with ExecutionStore(db).batch([thing], [("_restart-all", thing)]) as batch:
            report = Report(ExecutionState.SUCCEEDED, {"bootId": boot})
            batch.ledger.report(batch.ledger.find("_restart-all", thing), report, batch.now)
    states = {view.device_id: view.state for view in await FleetJobStore(db).executions("restart-all")}
    assert states == {"motor-1": ExecutionState.SUCCEEDED, "motor-2": ExecutionState.FAILED}


async def test_what_runs_is_cancelled_only_once_nothing_more_starts(db: Database) -> None:
    await add_devices(db, 4)
    plan = await plan_job(db, job("stop", "custom"))
    assert await attempt(db, "motor-1", "_stop", None)
    store = RolloutStore(db)
    with pytest.raises(RefusedError, match="it still starts devices"):
        await store.cancel_running(plan.job_no, "enough")
    await store.set_status(plan.job_no, JobStatus.HALTED, Phase.DRAINING, "enough", "alice")
    assert await store.cancel_running(plan.job_no, "enough") == ["motor-1"]
    assert await store.cancel_running(plan.job_no, "enough") == []
    await store.finish(plan.job_no, Outcome.ABORTED, "enough")
    assert (await FleetJobStore(db).figures(plan.job_no)).withdrawn == 4
    assert await miscounted(db, plan.job_no) == []


async def test_a_device_that_another_job_waits_for_is_not_told_that_nothing_waits(db: Database) -> None:
    await add_devices(db, 2)
    one = await plan_job(db, job("one", "custom"))
    await plan_job(db, job("two", "custom", target={"ids": ["motor-1"]}))
    store = RolloutStore(db)
    await store.withdraw(one.job_no, "enough")
    assert await store.withdrawn(one.job_no) == ["motor-2"]


async def test_jobs_are_listed_by_their_state_with_figures_that_add_up(db: Database) -> None:
    await add_devices(db, 5)
    await plan_job(db, job("one", "custom"))
    two = await plan_job(db, job("two", "custom"))
    await RolloutStore(db).finish(two.job_no, Outcome.ABORTED, "enough")
    store = FleetJobStore(db)
    views = await store.list()
    assert [view.name for view in views] == ["two", "one"]
    assert all(adds_up(view.progress) and view.progress.total == 5 for view in views)
    assert [view.name for view in await store.list(states=[JobStatus.RUNNING])] == ["one"]
    [one] = await store.list(states=[JobStatus.RUNNING])
    assert (one.operation, one.requested_by, one.job_id, one.workflow_id) == (
        JobOperation.CUSTOM,
        "alice",
        "_one",
        "job:one",
    )
    assert [wave.counts.queued for wave in one.waves] == [5]
    with pytest.raises(NotFoundError, match=r"no job .three.; .starter\.py job list."):
        await store.get("three")


async def test_without_the_exclusion_a_barred_device_would_be_given_work(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_devices(db, 2)
    await execute(db, "UPDATE devices SET barred_at = now() WHERE device_id = 'motor-1'")
    chosen = store.jobplanning._chosen_sql

    def blind(*asked: Any) -> Any:
        sql, parameters = chosen(*asked)
        return sql.replace("d.barred_at IS NULL", "true"), parameters

    monkeypatch.setattr(store.jobplanning, "_chosen_sql", blind)
    plan = await FleetJobStore(db).plan(PlanFleetJobInput(spec=job()))
    assert plan.devices == 2


async def test_without_the_look_at_time_a_next_attempt_would_come_at_once(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_devices(db, 1)
    await plan_job(db, job("try", "custom", retry={"max_attempts": 2, "backoff": "1h"}))
    assert await attempt(db, "motor-1", "_try", FAILED)
    why_not = Ledger.why_not
    monkeypatch.setattr(Ledger, "why_not", lambda self, execution, now: why_not(self, execution, now + 7200))
    assert await attempt(db, "motor-1", "_try", FAILED)


async def test_a_rollout_grants_one_attempt_and_its_failures_are_kept_as_well(db: Database) -> None:
    await add_devices(db, 2)
    await add_release(db, generate_private_key())
    plan = await RolloutStore(db).plan(PlanRolloutInput(spec=specification()))
    await RolloutStore(db).open_wave(plan.job_no, 1)
    assert await attempt(db, "motor-1", "motor-1_3_0", FAILED)
    found = await rows(db, "SELECT device_id, attempt, state, reason, retry_at FROM execution_failures")
    assert found == [("motor-1", 1, "FAILED", "no memory", None)]
    assert await rows(db, "SELECT state, execution_number FROM executions WHERE device_id = 'motor-1'") == [
        ("FAILED", 1)
    ]
    assert await miscounted(db, plan.job_no) == []
