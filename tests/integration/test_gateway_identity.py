"""The gateway on a real broker and a real PostgreSQL: configurations, commands, barred devices, clones, kept messages."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import aiomqtt
import orjson
import pytest

import gateway.service
import store.devicetraffic
from domain.configurations import ConfigState
from firmware.command import verify_command
from firmware.errors import FirmwareError, MisdirectedError, ReplayError
from models.device import DeviceFilter
from models.identity import DeviceHappening, RevocationReason
from models.protocol import Operation, command_topic, config_topic, heartbeat_topic, jobs_topic
from store.access import change_access, revoke, unbar
from store.alerts import AlertStore
from store.commands import close_command, get_command, open_command
from store.configurations import config_state, history, set_desired
from store.devicetraffic import Standing
from store.engine import Database
from store.registry import Registry
from store.waits import expect
from tests.cli_runner import run
from tests.conftest import Broker
from tests.integration.rollout_setup import Fleet, prepare
from tests.integration.test_gateway_jobs import Door, open_door

SOON = timedelta(hours=1)


@asynccontextmanager
async def identity_door(db: Database, broker: Broker, devices: int = 3) -> AsyncIterator[tuple[Door, Fleet]]:
    """A gateway, and a client that hears what is said about configurations and commands too."""
    fleet = await prepare(db, devices)
    async with open_door(db, broker, fleet) as door:
        for ending in ("get/accepted", "get/rejected", "update/accepted", "update/rejected", "update/delta"):
            await door.client.subscribe(config_topic("+", ending), qos=0)
        await door.client.subscribe(command_topic("+", "request"), qos=0)
        yield door, fleet


async def shadow(door: Door, thing: str, verb: str, body: Any = None, token: str = "") -> dict[str, Any]:
    """Ask the configuration's shadow; the answer."""
    token = token or f"t{time.monotonic_ns()}"
    payload = body if isinstance(body, bytes) else orjson.dumps({**(body or {}), "clientToken": token})
    await door.client.publish(config_topic(thing, verb), payload, qos=1)
    return await door.wait_for(thing, "ed", token)


async def report(door: Door, thing: str, version: int, **more: Any) -> dict[str, Any]:
    return await shadow(door, thing, "update", {"state": {"reported": {"version": version, **more}}})


async def want(db: Database, thing: str, config: dict[str, Any]) -> int:
    async with db.pool.connection() as connection:
        return await set_desired(connection, thing, config, "alice", "a test")


async def state_of(db: Database, thing: str) -> ConfigState:
    async with db.pool.connection() as connection:
        return await config_state(connection, thing)


async def rows(db: Database, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
    async with db.pool.connection() as connection:
        return list(await (await connection.execute(sql.encode(), arguments)).fetchall())


async def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    async with asyncio.timeout(seconds):
        while not (found := await condition()):
            await asyncio.sleep(0.05)
        return found


# --- configurations --------------------------------------------------------------------------------------------------


async def test_a_device_gets_its_configuration_reports_it_and_is_in_sync(db: Database, broker: Broker) -> None:
    async with identity_door(db, broker) as (door, _):
        missing = await shadow(door, "motor-1", "get")
        assert (missing["code"], missing["message"]) == (404, "No shadow exists with name: motor-1~config")
        assert await want(db, "motor-1", {"interval": 5, "led": {"on": True}}) == 1
        async with db.pool.connection() as connection:
            await expect(connection, "motor-1", "configure:motor-1", {DeviceHappening.CONFIGURED: 1})
        got = await shadow(door, "motor-1", "get")
        assert got["state"]["desired"] == {"version": 1, "config": {"interval": 5, "led": {"on": True}}}
        assert got["state"]["delta"] == {"version": 1, "config": {"interval": 5, "led": {"on": True}}}
        assert abs(got["metadata"]["desired"]["version"]["timestamp"] - time.time()) < 60
        assert await state_of(db, "motor-1") is ConfigState.PENDING
        accepted = await report(door, "motor-1", 1, config={"interval": 5, "led": {"on": True}})
        assert accepted["version"] == got["version"] + 1
        assert accepted["state"]["reported"]["config"] == {"interval": 5, "led": {"on": True}}
        assert await state_of(db, "motor-1") is ConfigState.IN_SYNC
        assert "delta" not in (await shadow(door, "motor-1", "get"))["state"]
        assert await rows(db, "SELECT workflow_id, event->'detail' FROM workflow_outbox") == [
            ("configure:motor-1", {"version": 1})
        ]
        async with db.pool.connection() as connection:
            [version] = await history(connection, "motor-1")
        assert version.acknowledged_at is not None and (version.actor, version.reason) == ("alice", "a test")
        assert not any(topic.endswith("delta") for topic, _ in door.answers["motor-1"])
        assert (await report(door, "stranger", 1))["code"] == 404


async def test_a_difference_is_published_before_the_answer_and_drift_is_seen(
    db: Database, broker: Broker, tmp_path: Any
) -> None:
    async with identity_door(db, broker) as (door, _):
        await want(db, "motor-1", {"interval": 5})
        await report(door, "motor-1", 1)
        assert await want(db, "motor-1", {"interval": 7}) == 2
        await report(door, "motor-1", 1)
        assert await state_of(db, "motor-1") is ConfigState.PENDING
        topics = [topic.split("config/")[1] for topic, _ in door.answers["motor-1"]]
        assert topics[-2:] == ["update/delta", "update/accepted"]
        delta = door.answers["motor-1"][-2][1]
        assert delta["state"] == {"version": 2, "config": {"interval": 7}} and "clientToken" in delta
        stale = await shadow(door, "motor-1", "update", {"state": {"reported": {"version": 2}}, "version": 1})
        assert stale["code"] == 409 and await state_of(db, "motor-1") is ConfigState.PENDING
        await report(door, "motor-1", 2, config={"interval": 8})
        assert await state_of(db, "motor-1") is ConfigState.DRIFTED
        await want(db, "motor-2", {"interval": 7})
        page = await Registry(db).find(DeviceFilter(), drifted=True)
        assert [device.device_id for device in page.devices] == ["motor-1"] and page.total == 1
    environment = {"TIDEGATE_DATABASE_URL": db.url, "TIDEGATE_STATE_DIR": str(tmp_path)}

    def command(*words: str) -> Any:
        ran = run(*words, "--json", **environment)
        assert ran.status == 0, ran.err
        return ran.json

    listed = await asyncio.to_thread(command, "device", "list", "--drifted")
    assert [device["device_id"] for device in listed["devices"]] == ["motor-1"]
    shown = await asyncio.to_thread(command, "device", "show", "motor-1")
    assert (shown["config_state"], shown["config_version"], shown["desired_config_version"]) == ("drifted", 2, 2)


REFUSED: list[tuple[bytes, int]] = [
    (b'{"clientToken":"x"}', 400),
    (b'{"state":[],"clientToken":"x"}', 400),
    (b'{"state":{"reported":null},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":"1"}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":true}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":-1}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":2000000000}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":1,"other":1}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":1,"config":[]}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":1}},"version":"x","clientToken":"x"}', 400),
    (b'{"state":{"desired":{"version":9}},"clientToken":"x"}', 403),
    (b'{"state":{"reported":{"version":1},"desired":null},"clientToken":"x"}', 403),
    (b'{"state":{"reported":{"version":1,"version":1}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":1,"config":{"a":"\\u0000"}}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":1,"config":' + b'{"a":' * 9 + b"1" + b"}" * 9 + b'}},"clientToken":"x"}', 400),
    (b'{"state":{"reported":{"version":1,"config":{"a":"' + b"x" * 8200 + b'"}}},"clientToken":"x"}', 413),
]


async def test_what_is_no_report_is_refused_with_its_token_and_kept(db: Database, broker: Broker) -> None:
    async with identity_door(db, broker) as (door, _):
        await want(db, "motor-1", {"interval": 5})
        for payload, code in REFUSED:
            door.answers.clear()
            refused = await shadow(door, "motor-1", "update", payload, token="x")
            assert refused["code"] == code, (payload, refused)
        await report(door, "motor-1", 1)
    assert len(await rows(db, "SELECT FROM quarantine")) == len(REFUSED)
    assert await state_of(db, "motor-1") is ConfigState.IN_SYNC
    assert await rows(db, "SELECT version FROM device_configurations") == [(1,)]


HOSTILE = (
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"state": 1, "requestId": 1, "status": 1, "clientToken": 7}',
    b'{"requestId": "\\u0000", "x": "\\u0000"}',
    b'{"x": {"a": 1, "a": 2}}',
    b'{"x": ' + b"[" * 50 + b"]" * 50 + b"}",
    b"[" * 20_000,
    b'{"x": "' + b"x" * 33_000 + b'"}',
    b'{"x": NaN}',
)


async def test_hostile_messages_about_configurations_and_commands_stop_nothing(db: Database, broker: Broker) -> None:
    topics = [
        config_topic("motor-1", "get"),
        config_topic("motor-1", "update"),
        command_topic("motor-1", "get"),
        command_topic("motor-1", "response"),
    ]
    async with identity_door(db, broker) as (door, _):
        for payload in HOSTILE:
            for topic in topics:
                await door.client.publish(topic, payload, qos=1)
            assert (await report(door, "motor-2", 0))["version"]
    kept = await rows(db, "SELECT topic, count(*) FROM quarantine GROUP BY topic ORDER BY topic")
    assert kept == [(topic, len(HOSTILE)) for topic in sorted(topics)]


# --- commands --------------------------------------------------------------------------------------------------------


async def ask_for_command(door: Door, thing: str) -> dict[str, Any]:
    token = f"t{time.monotonic_ns()}"
    await door.client.publish(command_topic(thing, "get"), orjson.dumps({"clientToken": token}), qos=1)
    return await door.wait_for(thing, "commands/request", token)


async def respond(door: Door, thing: str, request_id: str, status: str, **more: Any) -> None:
    body = {"requestId": request_id, "status": status, **more}
    await door.client.publish(command_topic(thing, "response"), orjson.dumps(body), qos=1)
    await ask_for_command(door, thing)  # batches keep a device's order: the answer has been used when this comes back


async def command(db: Database, thing: str, operation: Operation, **wait: Any) -> str:
    async with db.pool.connection() as connection:
        await expect(connection, thing, f"rotate:{thing}", {DeviceHappening.COMMAND_ANSWERED: None})
        return await open_command(connection, thing, operation, "alice", datetime.now(UTC) + wait.get("limit", SOON))


async def test_a_command_is_signed_for_its_device_carried_out_once_and_its_end_is_told(
    db: Database, broker: Broker
) -> None:
    async with identity_door(db, broker) as (door, fleet):
        nothing = await ask_for_command(door, "motor-1")
        assert set(nothing) == {"timestamp", "clientToken"}
        request_id = await command(db, "motor-1", Operation.ROTATE_CERTIFICATE)
        asked = await ask_for_command(door, "motor-1")
        assert (asked["requestId"], asked["operation"]) == (request_id, "rotate-certificate")

        def verify(answer: dict[str, Any], device: str, finished: frozenset[str] = frozenset()) -> Any:
            now, order = int(time.time()), answer["order"]
            return verify_command(order, fleet.trusted, device, finished, now, request_id=answer["requestId"])

        first = verify(asked, "motor-1").command
        assert first.expires_at - first.issued_at <= 900
        again = verify(await ask_for_command(door, "motor-1"), "motor-1").command
        assert again.request_id == first.request_id and again.nonce != first.nonce
        await respond(door, "motor-1", request_id, "accepted")
        assert "order" in await ask_for_command(door, "motor-1"), (
            "what was accepted and not finished is asked for again"
        )
        await respond(door, "motor-1", request_id, "succeeded", reason="done")
        assert "order" not in await ask_for_command(door, "motor-1")
        await respond(door, "motor-1", request_id, "failed", reason="no, it was not")
        with pytest.raises(ReplayError):
            verify(asked, "motor-1", frozenset({request_id}))
    async with db.pool.connection() as connection:
        ended = await get_command(connection, request_id)
    assert (ended.state, ended.answer) == ("succeeded", "done")
    assert await rows(db, "SELECT event->'detail' FROM workflow_outbox") == [
        ({"request_id": request_id, "status": "succeeded", "reason": "done"},)
    ]


async def test_no_device_can_use_or_answer_the_command_of_another(db: Database, broker: Broker) -> None:
    things = ("motor-1", "motor-2", "motor-3")
    async with identity_door(db, broker) as (door, fleet):
        ids = {thing: await command(db, thing, Operation.WIPE_CREDENTIALS) for thing in things}
        answers = {thing: await ask_for_command(door, thing) for thing in things}
        assert {thing: answer["requestId"] for thing, answer in answers.items()} == ids
        for owner in things:
            for other in things:
                order = answers[owner]["order"]
                arguments = (order, fleet.trusted, other, frozenset(), int(time.time()))
                if other == owner:
                    assert verify_command(*arguments, request_id=ids[owner]).operation is Operation.WIPE_CREDENTIALS
                    continue
                with pytest.raises(MisdirectedError):
                    verify_command(*arguments, request_id=ids[owner])
                with pytest.raises(FirmwareError):
                    verify_command(*arguments, request_id=ids[other])
                await respond(door, other, ids[owner], "succeeded")
    assert await rows(db, "SELECT DISTINCT state FROM device_commands") == [("pending",)]
    assert await rows(db, "SELECT FROM workflow_outbox") == []


async def test_a_command_that_has_expired_or_was_taken_back_is_not_handed_out(db: Database, broker: Broker) -> None:
    async with identity_door(db, broker) as (door, _):
        late = await command(db, "motor-1", Operation.ROTATE_CERTIFICATE, limit=timedelta(seconds=-1))
        taken_back = await command(db, "motor-2", Operation.ROTATE_CERTIFICATE)
        async with db.pool.connection() as connection:
            assert await close_command(connection, taken_back, "canceled", "a mistake")
            assert not await close_command(connection, taken_back, "expired")
        for thing in ("motor-1", "motor-2"):
            assert "order" not in await ask_for_command(door, thing)
        await respond(door, "motor-2", taken_back, "succeeded")
        fresh = await command(db, "motor-1", Operation.ROTATE_CERTIFICATE)
        assert fresh != late and fresh == await command(db, "motor-1", Operation.ROTATE_CERTIFICATE)
        assert (await ask_for_command(door, "motor-1"))["requestId"] == fresh
    states = dict(await rows(db, "SELECT request_id, state FROM device_commands"))
    assert states == {late: "expired", taken_back: "canceled", fresh: "pending"}


# --- waits -----------------------------------------------------------------------------------------------------------


async def test_workflows_are_told_of_the_first_message_and_the_first_heartbeat_once(
    db: Database, broker: Broker
) -> None:
    async with identity_door(db, broker) as (door, _):
        async with db.pool.connection() as connection:
            both = {DeviceHappening.CONNECTED: None, DeviceHappening.HEARTBEAT: None}
            await expect(connection, "motor-1", "provision:motor/1", both)
        await ask_for_command(door, "motor-2")
        assert await rows(db, "SELECT FROM workflow_outbox") == []
        await ask_for_command(door, "motor-1")
        told = "SELECT event->>'happening' FROM workflow_outbox ORDER BY outbox_no"
        assert await rows(db, told) == [("connected",)]
        for _ in range(2):
            await door.client.publish(heartbeat_topic("motor-1"), b"{}", qos=1)
            await ask_for_command(door, "motor-1")
        assert await rows(db, told) == [("connected",), ("heartbeat",)]


# --- barred devices --------------------------------------------------------------------------------------------------

_TRACE = """
SELECT p.uptime, e.version_number, d.config_document_version FROM devices d LEFT JOIN presence p USING (device_id)
LEFT JOIN executions e USING (device_id) WHERE d.device_id = %s
"""
REVOKED = 12


async def changed_after_revocation(db: Database, broker: Broker) -> list[str]:
    """Devices send heartbeats, reports and configurations all the time; some are revoked meanwhile. Those of which
    something has changed after the revocation had committed: its transaction reads what there is at its own end.
    """
    things = [f"motor-{i}" for i in range(1, REVOKED + 1)]
    left: dict[str, tuple[Any, ...]] = {}
    async with identity_door(db, broker, REVOKED + 1) as (door, _):
        for thing in (*things, f"motor-{REVOKED + 1}"):
            await door.ask(thing, "start-next")
            await want(db, thing, {"interval": 5})
        over = asyncio.Event()

        async def talk() -> None:
            number = 0
            while not over.is_set():
                number += 1
                for thing in (*things, f"motor-{REVOKED + 1}"):
                    update = {"status": "IN_PROGRESS", "statusDetails": {"percent": str(number % 100)}}
                    reported = {"state": {"reported": {"version": number}}}
                    await door.client.publish(heartbeat_topic(thing), b'{"uptime":%d}' % number, qos=0)
                    await door.client.publish(jobs_topic(thing, "motor-1_3_0", "update"), orjson.dumps(update), qos=0)
                    await door.client.publish(config_topic(thing, "update"), orjson.dumps(reported), qos=0)
                await asyncio.sleep(0.005)

        talking = asyncio.create_task(talk())
        await asyncio.sleep(0.5)
        for thing in things:
            async with db.pool.connection() as connection:
                await revoke(connection, thing, RevocationReason.KEY_COMPROMISE, "alice", "stolen")
                row = await (await connection.execute(_TRACE, (thing,))).fetchone()
                assert row is not None
                left[thing] = row
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        over.set()
        await talking
        await door.ask(f"motor-{REVOKED + 1}", "get")
        answered = len(door.answers[things[0]])
        await door.client.publish(jobs_topic(things[0], "get"), b"{}", qos=1)
        await door.client.publish(config_topic(things[0], "get"), b"{", qos=1)
        await door.ask(f"motor-{REVOKED + 1}", "get")
        assert all(uptime for uptime, _, _ in left.values()), "nothing was said before the revocations"
        free = await rows(db, _TRACE, f"motor-{REVOKED + 1}")
        assert free[0][0] > max(uptime for uptime, _, _ in left.values()), "the others go on"
        changed = [thing for thing in things if (await rows(db, _TRACE, thing))[0] != left[thing]]
        if not changed:
            assert len(door.answers[things[0]]) == answered, "a barred device was answered"
            assert await rows(db, "SELECT FROM quarantine WHERE thing = %s", things[0]) == []
        return changed


def read_slowly(monkeypatch: pytest.MonkeyPatch, forget: bool = False) -> None:
    """Make the time between looking who is barred and writing long enough for a revocation to fall into it."""
    original = gateway.service.read_standing

    async def slow(cursor: Any) -> Standing:
        standing = await original(cursor)
        await asyncio.sleep(0.03)
        return Standing(frozenset(), standing.awaited, standing.now) if forget else standing

    monkeypatch.setattr(gateway.service, "read_standing", slow)


async def test_an_open_session_changes_nothing_from_the_commit_of_its_revocation_on(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_slowly(monkeypatch)
    assert await changed_after_revocation(db, broker) == []


async def test_without_the_lock_a_batch_that_looked_before_writes_after(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(_connection: Any) -> None:
        return None

    monkeypatch.setattr(gateway.service, "share_access", nothing)
    read_slowly(monkeypatch)
    assert await changed_after_revocation(db, broker) != []


async def test_without_the_look_a_revoked_device_goes_on_writing(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_slowly(monkeypatch, forget=True)
    assert len(await changed_after_revocation(db, broker)) == REVOKED


async def test_a_device_that_is_let_in_again_is_heard_again(db: Database, broker: Broker) -> None:
    async with identity_door(db, broker) as (door, _):
        async with db.pool.connection() as connection:
            await revoke(connection, "motor-1", RevocationReason.UNSPECIFIED, "alice", "a mistake")
        await door.client.publish(heartbeat_topic("motor-1"), b"{}", qos=1)
        await ask_for_command(door, "motor-2")
        assert await rows(db, "SELECT FROM presence") == []
        shown = await Registry(db).get("motor-1")
        assert shown.barred_at is not None and shown.barred_reason == "a mistake"
        async with db.pool.connection() as connection:
            await change_access(connection)
            await unbar(connection, "motor-1", "alice", "so it was")
        assert (await ask_for_command(door, "motor-1"))["timestamp"]


# --- clones ----------------------------------------------------------------------------------------------------------


def beat(boot: str, at: float, **more: Any) -> bytes:
    return orjson.dumps({"bootId": boot, "timestamp": int(at * 1000), "uptime": 5, **more})


async def beats(door: Door, thing: str, sequence: list[tuple[str, float]], apart: bool = True) -> None:
    """Heartbeats of these boots at these times of the devices' clocks, each in a batch of its own."""
    for boot, at in sequence:
        await door.client.publish(heartbeat_topic(thing), beat(boot, at), qos=1)
        if apart:
            await ask_for_command(door, "motor-3")
    await ask_for_command(door, "motor-3")


async def alarmed(db: Database) -> list[str]:
    await asyncio.sleep(0.2)
    return [alert.subject for alert in await AlertStore(db).find() if alert.rule == "cloned-device"]


async def test_two_devices_with_one_identity_are_found_within_a_minute_and_barred(db: Database, broker: Broker) -> None:
    async with identity_door(db, broker):
        await want(db, "motor-1", {"interval": 5})
        over = asyncio.Event()

        async def device(client: aiomqtt.Client, boot: str, version: int, clock: float) -> None:
            while not over.is_set():
                await client.publish(heartbeat_topic("motor-1"), beat(boot, time.time() + clock), qos=1)
                state = {"state": {"reported": {"version": version, "config": {"interval": version}}}}
                await client.publish(config_topic("motor-1", "update"), orjson.dumps(state), qos=1)
                await asyncio.sleep(0.4)

        async with aiomqtt.Client(broker.host, broker.port) as one, aiomqtt.Client(broker.host, broker.port) as other:
            started = time.monotonic()
            # The second one's clock is a day behind: times are compared within a boot, never between two.
            running = [asyncio.create_task(device(one, "aa", 1, 0))]
            await asyncio.sleep(0.2)
            running.append(asyncio.create_task(device(other, "bb", 7, -86_400)))
            await until(lambda: alarmed(db), 60)
            assert time.monotonic() - started < 60
            trace = await until(lambda: rows(db, "SELECT status FROM devices WHERE barred_at IS NOT NULL"))
            assert trace == [("error",)]
            before = await rows(db, "SELECT config_document_version, config, desired_config_version FROM devices "
                                    "WHERE device_id = 'motor-1'")  # fmt: skip
            await asyncio.sleep(1.5)
            over.set()
            await asyncio.gather(*running)
        after = await rows(db, "SELECT config_document_version, config, desired_config_version FROM devices "
                               "WHERE device_id = 'motor-1'")  # fmt: skip
        assert before == after and before[0][2] == 1, "the configuration flaps between the two"
    [alert] = await AlertStore(db).find()
    assert alert.occurrences == 1 and "motor-1 is there twice" in alert.text
    audit = await rows(
        db, "SELECT action, actor FROM audit_events WHERE subject = 'motor-1' AND action LIKE 'device.%%'"
    )
    assert audit == [("device.barred", "gateway")]
    assert (await rows(db, "SELECT revision FROM access_state"))[0][0] == 1


async def test_three_clones_in_turn_and_two_in_one_batch_are_found(db: Database, broker: Broker) -> None:
    async with identity_door(db, broker) as (door, _):
        turns = [(boot, 1000.0 + 10 * turn) for turn in range(3) for boot in ("aa", "bb", "cc")]
        await beats(door, "motor-1", turns)
        assert await alarmed(db) == ["motor-1"]
        for turn in range(4):
            together = [("aa", 1000.0 + 10 * turn), ("bb", 1001.0 + 10 * turn)]
            await beats(door, "motor-2", together, apart=False)
        assert sorted(await alarmed(db)) == ["motor-1", "motor-2"]


async def one_device(db: Database, broker: Broker) -> list[str]:
    """A device that reboots often, and one whose messages come a second time; the alarms."""
    async with identity_door(db, broker) as (door, _):
        await beats(door, "motor-1", [(f"boot-{i}", 1000.0 + i // 2) for i in range(30)])
        await beats(door, "motor-1", [("without-clock", 0.0)] * 3)
        told = [("aa", 1000.0), ("aa", 1010.0), ("bb", 1020.0), ("bb", 1030.0)]
        await beats(door, "motor-2", told * 4)
        presence = await rows(db, "SELECT boot_id FROM presence WHERE device_id = 'motor-2'")
        assert presence == [("bb",)] or await alarmed(db)
        return await alarmed(db)


async def test_one_device_that_reboots_often_or_whose_messages_come_again_is_no_clone(
    db: Database, broker: Broker
) -> None:
    assert await one_device(db, broker) == []


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, old: str, new: str) -> None:
    statement = getattr(store.devicetraffic, name)
    spoilt = statement.replace(old, new)
    assert spoilt != statement
    monkeypatch.setattr(store.devicetraffic, name, spoilt)


async def test_without_comparing_times_a_repeated_message_looks_like_a_clone(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "_RECORD_DOUBTFUL", "WHERE NOT EXISTS", "WHERE true OR NOT EXISTS")
    assert await one_device(db, broker) == [], "what is taken for new is still compared with its boot's last time"
    spoil(monkeypatch, "_SAVE_LATER", "OR excluded.device_time > p.former_times", "OR true OR now() > p.former_times")
    async with db.pool.connection() as connection:
        await connection.execute("TRUNCATE devices, releases, jobs, waves, executions, presence, heartbeats")
    assert await one_device(db, broker) == ["motor-2"]


async def test_without_the_count_of_returns_nobody_sees_the_clone(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SAVE", "_SAVE_LATER"):
        spoil(monkeypatch, name, "boot_returns >= 2", "boot_returns >= 2000000")
    async with identity_door(db, broker) as (door, _):
        await beats(door, "motor-1", [(boot, 1000.0 + 10 * turn) for turn in range(4) for boot in ("aa", "bb")])
        assert await alarmed(db) == []


# --- kept messages ---------------------------------------------------------------------------------------------------


async def leave_and_come_back(db: Database, broker: Broker) -> tuple[Any, ...]:
    """A message that the broker keeps is published, used, and meets the next gateway; presence after that."""
    topic = heartbeat_topic("motor-1")
    try:
        async with identity_door(db, broker) as (door, fleet):
            await door.client.publish(topic, beat("aa", 1.0, uptime=1), qos=1, retain=True)
            await ask_for_command(door, "motor-1")
            await door.client.publish(topic, beat("aa", 2.0, uptime=2), qos=1)
            await ask_for_command(door, "motor-1")
        async with open_door(db, broker, fleet, f"another-{time.monotonic_ns()}") as door:
            await door.ask("motor-1", "get")
            await asyncio.sleep(0.3)
        return (await rows(db, "SELECT uptime, boot_id FROM presence"))[0]
    finally:
        async with aiomqtt.Client(broker.host, broker.port) as client:
            await client.publish(topic, b"", qos=1, retain=True)


async def test_what_a_broker_has_kept_has_no_effect_on_a_gateway_that_starts(db: Database, broker: Broker) -> None:
    assert await leave_and_come_back(db, broker) == (2, "aa")


async def test_without_the_look_at_the_flag_a_kept_message_counts(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = gateway.service.Gateway.receive

    def blind(self: Any, topic: Any, payload: bytes, retained: bool, duplicate: bool, receipt: Any) -> None:
        original(self, topic, payload, False, duplicate, receipt)

    monkeypatch.setattr(gateway.service.Gateway, "receive", blind)
    spoil(monkeypatch, "_RECORD_DOUBTFUL", "WHERE NOT EXISTS", "WHERE true OR NOT EXISTS")
    assert await leave_and_come_back(db, broker) == (1, "aa")
