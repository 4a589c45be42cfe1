"""The end of a device on a real PostgreSQL: one transaction, everything that hangs on it, and what may not come back."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import store.decommission as store_decommission
import store.planning as store_planning
import store.registry as store_registry
from domain.device_rows import Format
from domain.standing import why_not_configure, why_not_decommission, why_not_rotate
from firmware.keys import generate_private_key
from models.device import DeviceChanges, DeviceRecord, DeviceStatus
from models.errors import ConflictError, ImportRowError, NotFoundError, RefusedError
from models.lifecycle import AskToWipeInput, BeginDecommissionInput, EndDecommissionInput, RetireDeviceInput
from models.protocol import CommandStatus
from models.rollout import PlanRolloutInput, WaveStatus
from store.decommission import DecommissionStore
from store.engine import Database
from store.executions import ExecutionStore
from store.lifecycle import LifecycleStore
from store.registry import Registry
from store.rollouts import RolloutStore
from store.shadows import delete_shadow, set_desired
from tests.integration.life_setup import (
    add_authority,
    add_certificate,
    alerts,
    answer,
    audit_of,
    one,
    rows,
    waits,
)
from tests.integration.rollout_setup import add_devices, add_release, prepare, recount, specification

DEVICE, SERIAL, FLOW = "motor-1", "motor/1", "decommission:motor-1"
RETIRE = RetireDeviceInput(device_id=DEVICE, actor="alice", reason="scrapped")
BEGIN = BeginDecommissionInput(device_id=DEVICE, actor="alice", reason="scrapped")


@pytest.fixture
async def store(db: Database) -> DecommissionStore:
    await add_authority(db)
    return DecommissionStore(db)


def asking(minutes: int = 10) -> AskToWipeInput:
    until = datetime.now(UTC) + timedelta(minutes=minutes)
    return AskToWipeInput(device_id=DEVICE, workflow_id=FLOW, actor="alice", until=until)


async def enrol(db: Database, state: str) -> None:
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO enrolments (serial_number, spki_sha256, public_key, batch, state) VALUES (%s, %s, '', 'b', %s)",
            (SERIAL, state, state),
        )


# --- out of rollouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [True, False])
async def test_a_device_leaves_its_rollout_neutrally_and_frees_its_place(
    store: DecommissionStore, db: Database, started: bool
) -> None:
    fleet = await prepare(db, 10)
    if started:
        async with ExecutionStore(db).batch([DEVICE]) as batch:
            assert batch.ledger.admit(batch.ledger.pending_of(DEVICE)[0], batch.now, None) is None
    for _ in range(2):
        await store.begin(BEGIN)
    counts = (await fleet.store.progress(fleet.plan.job_no, 1)).wave.counts
    assert (counts.removed, counts.in_progress, counts.queued, counts.answered) == (1, 0, 9, 0)
    assert await recount(db, fleet.plan.job_no) == []
    assert (await one(db, "SELECT in_flight FROM jobs"))["in_flight"] == 0
    execution = await fleet.store.execution("motor-1.3.0", DEVICE)
    assert execution.reason == "decommissioned by alice: scrapped"
    removed = [event for event in await fleet.store.events(fleet.plan.job_no) if event.kind == "removed"]
    assert [(event.actor, event.text) for event in removed] == [
        ("alice", "motor-1 removed: decommissioned by alice: scrapped")
    ]


async def test_a_rollout_that_is_planned_while_the_device_is_asked_is_left_in_the_same_transaction(
    store: DecommissionStore, db: Database
) -> None:
    fleet = await prepare(db, 3)
    await add_certificate(db, DEVICE)
    retired = await store.retire(RETIRE)
    assert (retired.executions_removed, retired.certificates_revoked) == (1, 1)
    assert await recount(db, fleet.plan.job_no) == []


@pytest.mark.parametrize("mutant", [False, True])
async def test_a_plan_that_is_being_made_is_waited_for_or_a_rollout_would_hold_a_retired_device(
    store: DecommissionStore, db: Database, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    await add_devices(db, 3)
    await add_release(db, generate_private_key())
    chosen, go_on, insert = asyncio.Event(), asyncio.Event(), store_planning._insert_executions

    async def slowly(*arguments: Any) -> None:
        chosen.set()
        await go_on.wait()
        await insert(*arguments)

    async def not_at_all(*_: Any) -> None:
        return None

    monkeypatch.setattr(store_planning, "_insert_executions", slowly)
    if mutant:
        monkeypatch.setattr(store_decommission, "hold_planning", not_at_all)
    planning = asyncio.create_task(RolloutStore(db).plan(PlanRolloutInput(spec=specification())))
    await chosen.wait()
    retiring = asyncio.create_task(store.retire(RETIRE))
    await asyncio.wait([retiring], timeout=0.5)
    assert retiring.done() is mutant
    go_on.set()
    plan = await planning
    await retiring
    assert (await one(db, "SELECT status FROM devices WHERE device_id = %s", DEVICE))["status"] == "retired"
    execution = await one(db, "SELECT state FROM executions WHERE device_id = %s", DEVICE)
    assert execution["state"] == ("PENDING" if mutant else "REMOVED")
    assert await recount(db, plan.job_no) == []


@pytest.mark.parametrize("mutant", [False, True])
async def test_its_shadows_go_with_the_device_versions_included(
    store: DecommissionStore, db: Database, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    async def not_at_all(*_: Any) -> int:
        return 0

    if mutant:
        monkeypatch.setattr(store_decommission, "clear_shadows", not_at_all)
    await add_devices(db, 2)
    async with db.pool.connection() as connection:
        for device, name in ((DEVICE, ""), (DEVICE, "door"), ("motor-2", "")):
            await set_desired(connection, device, name, {"power": "on"}, "alice")
        await delete_shadow(connection, DEVICE, "door", "alice")
    for _ in range(2):
        await store.retire(RETIRE)
    left = await rows(db, "SELECT device_id FROM shadows ORDER BY device_id")
    assert [row["device_id"] for row in left] == ["motor-1", "motor-1", "motor-2"][0 if mutant else 2 :]
    async with db.pool.connection() as connection:
        with pytest.raises(RefusedError, match="cannot change the shadow of motor-1: it is retired"):
            await set_desired(connection, DEVICE, "", {"power": "on"}, "alice")


@pytest.mark.parametrize("change", ["status = 'retired'", "barred_at = now()"])
async def test_a_rollout_chooses_no_device_that_is_retired_or_barred_whatever_its_target_says(
    db: Database, change: str
) -> None:
    fleet = await prepare(db, 3, open_waves=0)
    await fleet.store.withdraw(fleet.plan.job_no, "never mind")
    async with db.pool.connection() as connection:
        await connection.execute(f"UPDATE devices SET {change} WHERE device_id = %s".encode(), (DEVICE,))
    spec = specification(name="again", target={"statuses": ["active", "retired"]})
    plan = await fleet.store.plan(PlanRolloutInput(spec=spec))
    assert plan.devices == 2
    with pytest.raises(RefusedError, match="no device matches the target"):
        await fleet.store.plan(PlanRolloutInput(spec=specification(name="alone", target={"ids": [DEVICE]})))


@pytest.mark.parametrize(("statuses", "devices"), [([], 2), (["active", "provisioning"], 3)])
async def test_a_rollout_waits_for_no_device_that_was_never_heard_of_unless_it_is_asked_for(
    db: Database, statuses: list[str], devices: int
) -> None:
    fleet = await prepare(db, 3, open_waves=0)
    await fleet.store.withdraw(fleet.plan.job_no, "never mind")
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE devices SET status = 'provisioning' WHERE device_id = %s", (DEVICE,))
    spec = specification(name="again", target={"type": "motor", "statuses": statuses})
    assert (await fleet.store.plan(PlanRolloutInput(spec=spec))).devices == devices


async def test_a_wave_whose_last_missing_device_is_removed_is_complete(store: DecommissionStore, db: Database) -> None:
    fleet = await prepare(db, 3)
    await store.begin(BEGIN)
    wave = (await fleet.store.progress(fleet.plan.job_no, 1)).wave
    assert wave.status is WaveStatus.OPEN
    assert (wave.counts.total, wave.counts.awaited) == (3, 2)


# --- asking it to wipe -----------------------------------------------------------------------------------------------


async def test_a_device_is_asked_once_and_its_answer_is_told_and_kept(store: DecommissionStore, db: Database) -> None:
    await add_devices(db, 1)
    await add_certificate(db, DEVICE)
    assert (await store.begin(BEGIN)).answers
    wipes = {(await store.ask_to_wipe(asking())).request_id for _ in range(3)}
    assert len(wipes) == 1
    assert await waits(db) == [(FLOW, "command-answered")]
    assert await answer(db, DEVICE) == "wipe-credentials"
    told = await one(db, "SELECT workflow_id, event->'detail'->>'request_id' AS request FROM workflow_outbox")
    assert told == {"workflow_id": FLOW, "request": wipes.pop()}
    assert (await store.ask_to_wipe(asking())).answered
    assert (await store.retire(RETIRE)).wiped


async def test_a_device_that_could_not_wipe_is_not_asked_again_and_not_called_wiped(
    store: DecommissionStore, db: Database
) -> None:
    await add_devices(db, 1)
    await add_certificate(db, DEVICE)
    await store.ask_to_wipe(asking())
    await answer(db, DEVICE, CommandStatus.FAILED)
    assert (await store.ask_to_wipe(asking())).answered
    assert not (await store.retire(RETIRE)).wiped


async def test_an_attempt_that_comes_after_the_end_leaves_no_wipe_for_who_comes_next(
    store: DecommissionStore, db: Database
) -> None:
    await add_devices(db, 1)
    await add_certificate(db, DEVICE)
    await store.retire(RETIRE)
    with pytest.raises(RefusedError, match="retired already"):
        await store.ask_to_wipe(asking())
    assert await one(db, "SELECT count(*) AS n FROM device_commands") == {"n": 0}


@pytest.mark.parametrize("change", ["barred_at = now()", None])
async def test_a_device_that_is_barred_or_has_no_certificate_is_not_waited_for(
    store: DecommissionStore, db: Database, change: str | None
) -> None:
    await add_devices(db, 1)
    if change:
        await add_certificate(db, DEVICE)
        async with db.pool.connection() as connection:
            await connection.execute(f"UPDATE devices SET {change}".encode())
    assert not (await store.begin(BEGIN)).answers


# --- the one transaction ---------------------------------------------------------------------------------------------


async def test_retiring_ends_everything_that_the_device_is_and_has(store: DecommissionStore, db: Database) -> None:
    await add_devices(db, 2)
    await add_certificate(db, DEVICE)
    await add_certificate(db, DEVICE, 2, confirmed=False)
    await store.ask_to_wipe(asking())
    for state in ("active", "conflict", "refused"):
        await enrol(db, state)
    before = (await one(db, "SELECT revision FROM access_state"))["revision"]
    retired = await store.retire(RETIRE)
    assert (retired.certificates_revoked, retired.wiped) == (2, False)
    assert retired.revision == (await one(db, "SELECT revision FROM access_state"))["revision"] > before
    device = await one(
        db, "SELECT status, retired_at, barred_at, barred_reason FROM devices WHERE device_id = %s", DEVICE
    )
    assert (device["status"], device["barred_reason"]) == ("retired", "scrapped")
    assert device["retired_at"] and device["barred_at"]
    assert await rows(db, "SELECT DISTINCT state, revocation_reason AS r FROM certificates") == [
        {"state": "revoked", "r": "cessationOfOperation"}
    ]
    tombstone = await one(db, "SELECT serial_number, device_id, retired_by, released_at FROM tombstones")
    assert list(tombstone.values()) == [SERIAL, DEVICE, "alice", None]
    states = {row["spki_sha256"]: row["state"] for row in await rows(db, "SELECT * FROM enrolments")}
    assert states == {"active": "closed", "conflict": "closed", "refused": "refused"}
    assert (await one(db, "SELECT state FROM device_commands"))["state"] == "canceled"
    assert await waits(db) == []
    assert (await audit_of(db, DEVICE))[-1] == "device.retired"
    assert (await one(db, "SELECT status FROM devices WHERE device_id = 'motor-2'"))["status"] == "active"


async def test_retiring_twice_says_the_same_and_leaves_no_second_line(store: DecommissionStore, db: Database) -> None:
    await prepare(db, 2)
    await add_certificate(db, DEVICE)
    first, again = await store.retire(RETIRE), await store.retire(RETIRE)
    assert again.model_copy(update={"revision": first.revision}) == first
    for _ in range(2):
        await store.end(EndDecommissionInput(device_id=DEVICE, actor="alice", reason="done"))
    done = await audit_of(db, DEVICE)
    assert (done.count("device.retired"), done.count("device.decommissioned")) == (1, 1)
    assert len(await rows(db, "SELECT * FROM tombstones")) == 1


async def test_a_device_that_is_decommissioned_is_refused_and_an_unknown_one_is_not_found(
    store: DecommissionStore, db: Database
) -> None:
    await add_devices(db, 1)
    await store.retire(RETIRE)
    with pytest.raises(RefusedError, match="cannot decommission motor-1: it is retired already"):
        await store.begin(BEGIN)
    with pytest.raises(NotFoundError, match="no device with the id 'nobody'"):
        await store.begin(BEGIN.model_copy(update={"device_id": "nobody"}))
    lifecycle = LifecycleStore(db)
    for why_not in (why_not_configure, why_not_rotate, why_not_decommission):
        with pytest.raises(RefusedError, match="retired"):
            await lifecycle.check(DEVICE, why_not)


async def test_a_device_that_was_only_marked_as_retired_can_be_decommissioned(
    store: DecommissionStore, db: Database
) -> None:
    await add_devices(db, 1)
    await add_certificate(db, DEVICE)
    await Registry(db).retire(DEVICE)
    assert not (await store.begin(BEGIN)).answers
    assert (await store.retire(RETIRE)).certificates_revoked == 1
    assert len(await rows(db, "SELECT * FROM tombstones")) == 1


async def test_brokers_that_are_alive_and_behind_are_named(store: DecommissionStore, db: Database) -> None:
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO brokers (broker_id, applied_revision, seen_at) VALUES ('up', 7, now()), ('slow', 6, now()), "
            "('gone', 1, now() - interval '3 minutes')"
        )
    assert await store.brokers_behind(7) == ["slow"]
    assert await store.brokers_behind(6) == []
    await store.alert("broker-behind", "slow", "it does not follow")
    assert await alerts(db) == {"broker-behind": "slow"}


# --- what may not come back ------------------------------------------------------------------------------------------

HEADER = b"device_id,device_type,serial_number,site_id,status\n"


async def imported(db: Database, *lines: bytes) -> None:
    await Registry(db).import_devices([HEADER, *(line + b"\n" for line in lines)], "fleet.csv", Format.CSV)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"motor-1,motor,motor/1,berlin,active", "device_id"),
        (b"motor-9,motor,motor/1,berlin,active", "serial_number"),
        (b"motor-9,motor,motor/1,berlin,", "serial_number"),
        (b"motor-1,motor,another,berlin,active", "device_id"),
        (b"motor-1,motor,another,berlin,", "device_id"),
    ],
)
async def test_an_import_brings_back_nothing_that_was_decommissioned(
    store: DecommissionStore, db: Database, line: bytes, path: str
) -> None:
    await add_devices(db, 1)
    await store.retire(RETIRE)
    async with db.pool.connection() as connection:
        if line.startswith(b"motor-9"):
            await connection.execute("DELETE FROM devices")
    with pytest.raises(ImportRowError) as refused:
        await imported(db, b"pump-1,motor,P1,berlin,active", line)
    [mistake] = refused.value.mistakes
    assert (mistake.line, mistake.path) == (3, path)
    assert "was decommissioned at" in mistake.message
    assert await rows(db, "SELECT * FROM devices WHERE device_id = 'pump-1'") == []


async def test_without_the_guard_an_import_would_bring_a_decommissioned_device_back(
    store: DecommissionStore, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_devices(db, 1)
    await store.retire(RETIRE)

    async def look_away(*_: Any) -> None:
        return None

    monkeypatch.setattr(store_registry, "_refuse_buried", look_away)
    await imported(db, b"motor-1,motor,motor/1,berlin,active")
    assert (await Registry(db).get(DEVICE)).status is DeviceStatus.ACTIVE


@pytest.mark.parametrize("status", [b"retired", b""])
async def test_a_file_may_still_speak_of_it_as_retired(store: DecommissionStore, db: Database, status: bytes) -> None:
    await add_devices(db, 1)
    await store.retire(RETIRE)
    await imported(db, b"motor-1,motor,motor/1,oslo," + status)
    device = await Registry(db).get(DEVICE)
    assert (device.status, device.site_id) == (DeviceStatus.RETIRED, "oslo")


async def test_neither_creating_nor_updating_brings_it_back(store: DecommissionStore, db: Database) -> None:
    await add_devices(db, 2)
    await store.retire(RETIRE)
    registry = Registry(db)
    with pytest.raises(RefusedError, match="cannot make device motor-1 active: it was decommissioned"):
        await registry.update(DEVICE, DeviceChanges(status=DeviceStatus.ACTIVE))
    record = DeviceRecord(device_id="pump-1", device_type="motor", serial_number=SERIAL, site_id="berlin")
    async with db.pool.connection() as connection:
        await connection.execute("DELETE FROM devices WHERE device_id = %s", (DEVICE,))
    with pytest.raises(ConflictError, match=r"cannot create device pump-1: device motor-1 .* was decommissioned"):
        await registry.create(record)


async def test_a_released_serial_number_is_free_and_a_person_has_to_release_it(
    store: DecommissionStore, db: Database
) -> None:
    await add_devices(db, 1)
    await store.retire(RETIRE)
    lifecycle = LifecycleStore(db)
    assert await lifecycle.release(SERIAL, "bob", "repaired") == DEVICE
    with pytest.raises(NotFoundError, match="no tombstone stands for the serial number 'motor/1'"):
        await lifecycle.release(SERIAL, "bob", "")
    assert await audit_of(db, SERIAL) == ["serial.released"]
    await imported(db, b"motor-1,motor,motor/1,berlin,provisioning")
    assert (await Registry(db).get(DEVICE)).status is DeviceStatus.PROVISIONING
    assert (await store.retire(RETIRE)).executions_removed == 0
    assert len(await rows(db, "SELECT * FROM tombstones")) == 2
