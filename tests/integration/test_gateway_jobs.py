"""The gateway on a real broker and a real PostgreSQL: what devices ask, what they are answered, what is kept."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiomqtt
import orjson
import pytest

from firmware.verify import DeviceFacts, verify_update
from gateway.documents import Documents
from gateway.service import Gateway
from models.protocol import REQUEST_FILTERS, heartbeat_topic, jobs_topic
from models.settings import Settings
from store.engine import Database
from tests.conftest import Broker
from tests.integration.rollout_setup import NEW, OLD, Fleet, prepare, recount
from transport.connection import Connection

JOB = "motor-1_3_0"


@dataclass
class Door:
    """A running gateway and a client that may play any device."""

    fleet: Fleet
    client: aiomqtt.Client
    gateway: Gateway
    answers: dict[str, list[tuple[str, dict[str, Any]]]] = field(default_factory=dict)
    heard: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def listen(self) -> None:
        async for message in self.client.messages:
            parts = str(message.topic).split("/")
            thing = parts[1] if parts[0] == "devices" else parts[2]
            async with self.heard:
                self.answers.setdefault(thing, []).append((str(message.topic), orjson.loads(message.payload)))
                self.heard.notify_all()

    async def wait_for(self, thing: str, ending: str, token: str | None = None, seconds: float = 10) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            for topic, body in self.answers.get(thing, []):
                if topic.endswith(ending) and (token is None or body.get("clientToken") == token):
                    return body
            return None

        async with asyncio.timeout(seconds):
            async with self.heard:
                await self.heard.wait_for(lambda: found() is not None)
        body = found()
        assert body is not None
        return body

    async def ask(self, thing: str, *parts: str, **body: Any) -> tuple[bool, dict[str, Any]]:
        """Send a jobs request; returns whether it was accepted, and the answer."""
        token = body.setdefault("clientToken", f"t{random.getrandbits(60)}")
        await self.client.publish(jobs_topic(thing, *parts), orjson.dumps(body), qos=1)
        answer = await self.wait_for(thing, "ed", token)
        return "code" not in answer, answer


@asynccontextmanager
async def open_door(db: Database, broker: Broker, fleet: Fleet, client_id: str = "gateway-test") -> AsyncIterator[Door]:
    settings = Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}", database_url=db.url)
    connection, stop = Connection(client_id, keep_session=True), asyncio.Event()
    documents = Documents("http://127.0.0.1:1/", fleet.order_key, 3600)
    gateway = Gateway(db, connection, documents, settings)
    await connection.open(settings, REQUEST_FILTERS, gateway.receive)
    running = asyncio.create_task(gateway.run(stop))
    try:
        async with aiomqtt.Client(broker.host, broker.port, protocol=aiomqtt.ProtocolVersion.V311) as client:
            for kind in ("+/accepted", "+/rejected", "+/+/accepted", "+/+/rejected", "notify", "notify-next"):
                await client.subscribe(jobs_topic("+", kind), qos=0)
            door = Door(fleet, client, gateway)
            listening = asyncio.create_task(door.listen())
            try:
                yield door
            finally:
                listening.cancel()
    finally:
        stop.set()
        await running
        await connection.close()


async def test_a_device_is_taken_through_an_update_and_every_answer_carries_its_token(
    db: Database, broker: Broker
) -> None:
    fleet = await prepare(db, 3)
    async with open_door(db, broker, fleet) as door:
        accepted, listed = await door.ask("motor-1", "get")
        assert accepted and [job["jobId"] for job in listed["queuedJobs"]] == [JOB] and listed["inProgressJobs"] == []
        accepted, described = await door.ask("motor-1", "$next", "get")
        assert accepted and "order" not in described["execution"]["jobDocument"], "a queued device has no order yet"
        accepted, started = await door.ask("motor-1", "start-next", statusDetails={"step": "accepted"})
        execution = started["execution"]
        assert (execution["status"], execution["versionNumber"], execution["thingName"]) == (
            "IN_PROGRESS",
            2,
            "motor-1",
        )
        facts = DeviceFacts("motor-1", "motor", None, 0, OLD, frozenset(), 0)
        verified = verify_update(execution["jobDocument"], fleet.trusted, facts, int(started["timestamp"]), job_id=JOB)
        assert verified.release.sha256 == NEW and verified.order.attempt == 1
        accepted, again = await door.ask("motor-1", "start-next")
        assert again["execution"]["versionNumber"] == 2, "asking again hands out the same execution"
        accepted, state = await door.ask(
            "motor-1",
            JOB,
            "update",
            status="IN_PROGRESS",
            expectedVersion="2",
            statusDetails={"step": "confirming"},
            includeJobExecutionState=True,
        )
        assert accepted and state["executionState"]["versionNumber"] == 3
        accepted, mismatch = await door.ask("motor-1", JOB, "update", status="FAILED", expectedVersion=2)
        assert mismatch["code"] == "VersionMismatch" and mismatch["executionState"]["versionNumber"] == 3
        details = {"version": "1.3.0", "sha256": NEW, "slot": "b"}
        accepted, _ = await door.ask("motor-1", JOB, "update", status="SUCCEEDED", statusDetails=details)
        assert accepted
        assert "execution" not in await door.wait_for("motor-1", "jobs/notify-next")
        assert (await door.wait_for("motor-1", "jobs/notify"))["jobs"] == {}
        accepted, late = await door.ask("motor-1", JOB, "update", status="SUCCEEDED", statusDetails=details)
        assert late["code"] == "TerminalStateReached"
        accepted, nothing = await door.ask("motor-1", "start-next")
        assert accepted and "execution" not in nothing
        accepted, unknown = await door.ask("motor-1", "no-such-job", "update", status="FAILED")
        assert unknown["code"] == "ResourceNotFound"
        accepted, illegal = await door.ask("motor-2", JOB, "update", status="SUCCEEDED", statusDetails=details)
        assert illegal["code"] == "InvalidStateTransition"
    assert await recount(db, fleet.plan.job_no) == []
    async with db.pool.connection() as connection:
        row = await (
            await connection.execute("SELECT firmware_version, firmware_sha256 FROM devices WHERE device_id='motor-1'")
        ).fetchone()
    assert row == ("1.3.0", NEW)


HOSTILE = [
    b"\xff\xfe",
    b"{",
    b"[]",
    b'{"status": NaN}',
    b'{"statusDetails": {"step": "a\\u0000b"}, "status": "IN_PROGRESS"}',
    b'{"statusDetails": {"step": "\\ud800"}, "status": "IN_PROGRESS"}',
    b'{"status": 7}',
    b'{"status": "CANCELED"}',
    b'{"status": "IN_PROGRESS", "expectedVersion": 1e99}',
    b'{"status": "IN_PROGRESS", "statusDetails": {"a": 1}}',
    b'{"clientToken": "' + b"x" * 65 + b'"}',
    b"[" * 20_000,
    b'"' + b"x" * 40_000 + b'"',
    b'{"status": "IN_PROGRESS", "statusDetails": {' + b",".join(b'"k%d":"v"' % i for i in range(11)) + b"}}",
]


async def test_hostile_messages_are_answered_kept_and_stop_nothing(db: Database, broker: Broker) -> None:
    fleet = await prepare(db, 20)
    async with open_door(db, broker, fleet) as door:
        for number, payload in enumerate(HOSTILE):
            await door.client.publish(jobs_topic("motor-20", JOB, "update"), payload, qos=1)
            accepted, answer = await door.ask(f"motor-{number + 1}", "start-next")
            assert accepted and answer["execution"]["jobId"] == JOB
        await door.client.publish("$aws/things/motor-20/jobs/a%b/update", b"{}", qos=1)
        await door.client.publish(heartbeat_topic("motor-20"), b'{"uptime": "long"}', qos=1)
        await door.ask("motor-20", "get")
        refused = [body for topic, body in door.answers["motor-20"] if topic.endswith("update/rejected")]
        assert len(refused) == len(HOSTILE)
    async with db.pool.connection() as connection:
        kept = await (await connection.execute("SELECT code, size_bytes, length(payload) FROM quarantine")).fetchall()
    assert len(kept) == len(HOSTILE) + 2
    assert {code for code, _, _ in kept} == {"InvalidJson", "InvalidRequest", "InvalidTopic"}
    assert all(length == min(size, 4096) for _, size, length in kept)


async def test_a_message_that_breaks_the_transaction_is_isolated_from_its_batch(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = await prepare(db, 10)
    import gateway.service

    original = gateway.service.answer

    def poisoned(request: Any, *others: Any) -> Any:
        if request.topic.thing == "motor-5":
            raise ValueError("a defect that only this message meets")
        return original(request, *others)

    monkeypatch.setattr(gateway.service, "answer", poisoned)
    async with open_door(db, broker, fleet) as door:
        asked = [door.ask(f"motor-{i}", "start-next") for i in range(1, 11)]
        answers = await asyncio.gather(*asked)
    assert [body.get("code") for _, body in answers] == [None] * 4 + ["InternalError"] + [None] * 5
    async with db.pool.connection() as connection:
        kept = await (await connection.execute("SELECT thing, code FROM quarantine")).fetchall()
    assert kept == [("motor-5", "InternalError")]


async def test_heartbeats_become_presence_and_unknown_devices_leave_nothing(db: Database, broker: Broker) -> None:
    fleet = await prepare(db, 2)
    async with open_door(db, broker, fleet) as door:
        beat = {"deviceId": "motor-1", "timestamp": 1_790_000_000_000, "uptime": 42, "cpuTemperature": 61.5, "fan": 7}
        for thing in ("motor-1", "stranger"):
            await door.client.publish(heartbeat_topic(thing), orjson.dumps({**beat, "deviceId": thing}), qos=1)
        claim = {**beat, "firmwareVersion": "1.3.0", "firmwareSha256": NEW, "uptime": 43}
        await door.client.publish(heartbeat_topic("motor-1"), orjson.dumps(claim), qos=1)
        await door.ask("motor-2", "get")
        await asyncio.sleep(0.3)
    async with db.pool.connection() as connection:
        rows = await (
            await connection.execute("SELECT device_id, uptime, cpu_temperature, extra FROM presence")
        ).fetchall()
        installed = await (
            await connection.execute("SELECT firmware_sha256 FROM devices WHERE device_id = 'motor-1'")
        ).fetchone()
    assert rows == [("motor-1", 43, 61.5, {"fan": 7})]
    assert installed == (NEW,)


async def test_what_is_sent_while_the_gateway_is_away_is_used_when_it_is_back(db: Database, broker: Broker) -> None:
    fleet = await prepare(db, 5)
    async with open_door(db, broker, fleet, "gateway-away"):
        pass
    async with aiomqtt.Client(broker.host, broker.port) as client:
        for i in range(1, 6):
            await client.publish(jobs_topic(f"motor-{i}", "start-next"), b"{}", qos=1)
    async with open_door(db, broker, fleet, "gateway-away") as door:
        async with asyncio.timeout(10):
            while (await fleet.store.progress(fleet.plan.job_no, 1)).in_flight < 5:
                await asyncio.sleep(0.05)
        assert door.gateway.waiting == []


async def test_nothing_is_acknowledged_or_lost_while_postgresql_refuses(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    fleet = await prepare(db, 5)
    async with open_door(db, broker, fleet) as door:
        original, refusals = door.gateway._transact, 0

        async def away(batch: Any) -> Any:
            nonlocal refusals
            refusals += 1
            if refusals <= 2:
                raise psycopg.OperationalError("the server closed the connection")
            return await original(batch)

        monkeypatch.setattr(door.gateway, "_transact", away)
        accepted, answer = await door.ask("motor-1", "start-next")
        assert accepted and answer["execution"]["jobId"] == JOB and refusals >= 3


async def test_what_postgresql_refuses_is_isolated_and_nothing_of_its_batch_is_half_written(
    db: Database, broker: Broker
) -> None:
    fleet = await prepare(db, 10)
    async with db.pool.connection() as connection:
        await connection.execute("ALTER TABLE presence ADD CONSTRAINT test_refused CHECK (uptime IS DISTINCT FROM 13)")
    try:
        async with open_door(db, broker, fleet) as door:
            for i in range(1, 11):
                beat = orjson.dumps({"uptime": 13 if i == 5 else 7})
                await door.client.publish(heartbeat_topic(f"motor-{i}"), beat, qos=1)
            answers = await asyncio.gather(*(door.ask(f"motor-{i}", "start-next") for i in range(1, 11)))
            assert all(accepted and body["execution"]["versionNumber"] == 2 for accepted, body in answers)
        async with db.pool.connection() as connection:
            kept = await (await connection.execute("SELECT thing, code FROM quarantine")).fetchall()
            beats = await (await connection.execute("SELECT count(*) FROM presence WHERE uptime = 7")).fetchone()
        assert kept == [("motor-5", "InternalError")] and beats == (9,)
        assert await recount(db, fleet.plan.job_no) == []
    finally:
        async with db.pool.connection() as connection:
            await connection.execute("ALTER TABLE presence DROP CONSTRAINT test_refused")


async def test_a_message_that_the_reader_has_a_defect_for_is_kept_and_over(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gateway.service

    original = gateway.service.parse_request

    def defective(topic: Any, payload: bytes) -> Any:
        if topic.thing == "motor-2":
            raise RecursionError("a defect that only this message meets")
        return original(topic, payload)

    fleet = await prepare(db, 3)
    with monkeypatch.context() as patched:
        patched.setattr(gateway.service, "parse_request", defective)
        async with open_door(db, broker, fleet, "gateway-defect") as door:
            accepted, answer = (await asyncio.gather(door.ask("motor-1", "get"), ask_for_token(door, "motor-2")))[0]
            assert accepted and len(answer["queuedJobs"]) == 1
    async with open_door(db, broker, fleet, "gateway-defect") as door:
        await door.ask("motor-3", "get")
        assert "motor-2" not in door.answers, "it was acknowledged, so it does not come again"
    async with db.pool.connection() as connection:
        kept = await (await connection.execute("SELECT thing, code FROM quarantine")).fetchall()
    assert kept == [("motor-2", "InternalError")]


async def ask_for_token(door: Door, thing: str) -> None:
    """A request whose answer carries no token, for nobody could read it."""
    await door.client.publish(jobs_topic(thing, "get"), b"{}", qos=1)
    body = await door.wait_for(thing, "rejected")
    assert body["code"] == "InternalError"
