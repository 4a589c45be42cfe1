"""Shadows on a real broker and a real PostgreSQL: what devices ask, what they are answered, what is kept."""

import asyncio
import time
from typing import Any

import aiomqtt
import orjson
import pytest

import gateway.service
import gateway.shadow
from domain.shadow import Document
from gateway.documents import Documents
from gateway.service import Gateway
from models.identity import DeviceHappening
from models.protocol import shadow_topic
from models.settings import Settings
from store.access import bar, change_access
from store.engine import Database
from store.waits import expect
from tests.conftest import Broker
from tests.integration.rollout_setup import Fleet, prepare
from tests.integration.shadow_setup import ask, desire, heard, report, rows, send, shadow_door
from tests.integration.test_gateway_jobs import Door, open_door
from transport.connection import Connection


async def test_a_shadow_is_wanted_reported_read_and_deleted(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        missing = await ask(door, "motor-1", "get")
        assert (missing["code"], missing["message"]) == (404, "No shadow exists with name: motor-1")
        wanted = await desire(door, "motor-1", {"power": "on", "level": 3})
        assert (wanted["version"], wanted["state"]) == (1, {"desired": {"power": "on", "level": 3}})
        assert abs(wanted["metadata"]["desired"]["level"]["timestamp"] - time.time()) < 60
        told = await report(door, "motor-1", {"power": "on", "level": 2})
        assert heard(door, "motor-1", told["clientToken"]) == ["delta", "documents", "accepted"]
        delta = next(body for topic, body in reversed(door.answers["motor-1"]) if topic.endswith("update/delta"))
        assert (delta["state"], delta["version"]) == ({"level": 3}, 2)
        assert delta["metadata"] == {"level": wanted["metadata"]["desired"]["level"]}
        documents = next(body for topic, body in door.answers["motor-1"] if topic.endswith("documents"))
        assert (documents["previous"]["version"], documents["current"]["version"]) == (0, 1)
        got = await ask(door, "motor-1", "get")
        assert got["state"] == {
            "desired": {"power": "on", "level": 3},
            "reported": {"power": "on", "level": 2},
            "delta": {"level": 3},
        }
        assert got["version"] == 2 and set(got["metadata"]) == {"desired", "reported"}
        synced = await report(door, "motor-1", {"level": 3.0})
        assert heard(door, "motor-1", synced["clientToken"]) == ["documents", "accepted"]
        deleted = await ask(door, "motor-1", "delete")
        assert deleted["version"] == 3 and "state" not in deleted
        assert (await ask(door, "motor-1", "get"))["code"] == 404
        assert (await ask(door, "motor-1", "delete"))["code"] == 404
    history = await rows(db, "SELECT version, actor, change FROM shadow_history ORDER BY at")
    assert [(version, change is None) for version, _, change in history] == [
        (1, False),
        (2, False),
        (3, False),
        (3, True),
    ]
    assert {actor for _, actor, _ in history} == {"device:motor-1"}
    assert history[1][2] == {"reported": {"power": "on", "level": 2}}
    assert await rows(db, "SELECT FROM quarantine") == []


async def test_an_empty_get_is_one_and_is_answered_without_a_token(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        await desire(door, "motor-1", {"a": 1})
        await door.client.publish(shadow_topic("motor-1", "", "get"), b"", qos=1)
        got = await door.wait_for("motor-1", "shadow/get/accepted")
        assert got["state"]["desired"] == {"a": 1} and "clientToken" not in got


async def test_a_deleted_shadow_keeps_its_version_for_two_days(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        for _ in range(4):
            await report(door, "motor-1", {"a": 1})
        await ask(door, "motor-1", "delete")
        assert (await report(door, "motor-1", {"b": 1}))["version"] == 5
        assert (await ask(door, "motor-1", "get"))["state"] == {"reported": {"b": 1}}
        await ask(door, "motor-1", "delete")
        await rows(db, "UPDATE shadows SET deleted_at = now() - interval '49 hours' RETURNING 1")
        assert (await report(door, "motor-1", {"c": 1}))["version"] == 1


async def test_named_shadows_are_apart_from_each_other_and_from_the_classic_one(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        await desire(door, "motor-1", {"a": 0})
        for number, name in enumerate(("door", "$lamp:1_a-b"), 1):
            missing = await ask(door, "motor-1", "get", name=name)
            assert (missing["code"], missing["message"]) == (404, f"No shadow exists with name: motor-1~{name}")
            assert (await desire(door, "motor-1", {"a": number}, name=name))["version"] == 1
            assert (await ask(door, "motor-1", "get", name=name))["state"]["desired"] == {"a": number}
        await ask(door, "motor-1", "delete", name="door")
        assert (await ask(door, "motor-1", "get"))["state"]["desired"] == {"a": 0}
    assert await rows(db, 'SELECT name, deleted_at IS NULL FROM shadows ORDER BY name COLLATE "C"') == [
        ("", True),
        ("$lamp:1_a-b", True),
        ("door", False),
    ]


async def test_a_version_that_is_not_the_current_one_is_a_conflict_and_changes_nothing(
    db: Database, broker: Broker
) -> None:
    async with shadow_door(db, broker) as door:
        assert (await desire(door, "motor-1", {"a": 1}, version=1))["code"] == 409
        assert (await desire(door, "motor-1", {"a": 1}, version=0))["version"] == 1
        conflict = await desire(door, "motor-1", {"a": 2}, version=2)
        assert (conflict["code"], conflict["message"]) == (409, "Version conflict")
        assert (await ask(door, "motor-1", "delete", {"version": 7}))["code"] == 409
        assert (await desire(door, "motor-1", {"a": 3}, version=1))["version"] == 2
    assert await rows(db, "SELECT desired, version FROM shadows") == [({"a": 3}, 2)]


@pytest.mark.parametrize("mutant", [False, True])
async def test_of_two_that_write_what_they_have_read_one_is_told_or_its_word_would_be_lost(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    if mutant:
        real = Document.updated
        monkeypatch.setattr(Document, "updated", lambda self, patch, now, _expected=None: real(self, patch, now))
    async with shadow_door(db, broker) as door:
        await report(door, "motor-1", {"count": 1})
        answers = await asyncio.gather(*(report(door, "motor-1", {"count": 2}, version=1) for _ in range(2)))
    assert sorted(answer.get("code", 0) for answer in answers) == [0, 0 if mutant else 409]
    assert await rows(db, "SELECT reported FROM shadows") == [({"count": 2},)]


async def test_limits_are_judged_after_the_merge(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        await desire(door, "motor-1", {"a": "x" * 5000})
        too_large = await report(door, "motor-1", {"b": "x" * 5000})
        assert too_large["code"] == 413
        assert too_large["message"].startswith("The payload exceeds the maximum size allowed")
        assert (await report(door, "motor-1", {"b": "x" * 3000}))["version"] == 2
        assert (await report(door, "motor-1", {f"k{n}": n for n in range(201)}))["code"] == 400
        assert (await ask(door, "motor-1", "get"))["version"] == 2
    assert await rows(db, "SELECT FROM quarantine") == [], (
        "a well-formed request that is refused is nothing to look into"
    )


async def test_a_device_that_is_not_in_the_registry_has_no_shadow(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        for verb in ("get", "update", "delete"):
            answer = await ask(door, "stranger", verb, {"state": {"reported": {"a": 1}}})
            assert (answer["code"], answer["message"]) == (404, "Thing not found")
    assert await rows(db, "SELECT FROM shadows UNION ALL SELECT FROM shadow_history") == []


REFUSED: list[tuple[bytes, int, bool]] = [
    (b"{", 400, False),
    (b"[]", 400, False),
    (b"\xff\xfe{}", 415, False),
    (b'{"clientToken":7,"state":{"reported":{}}}', 400, False),
    (b'{"clientToken":"' + b"t" * 65 + b'","state":{"reported":{}}}', 400, False),
    (b'{"clientToken":"x"}', 400, True),
    (b'{"state":null,"clientToken":"x"}', 400, True),
    (b'{"state":{},"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":1},"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":[]},"clientToken":"x"}', 400, True),
    (b'{"state":{"delta":{}},"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":{"a":[1,null]}},"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":{"a":1,"a":2}},"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":{"a":"\\u0000"}},"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":{"a":"\\ud800"}},"clientToken":"x"}', 400, False),
    (b'{"state":{"reported":{"a":NaN}},"clientToken":"x"}', 400, False),
    (b'{"state":{"reported":{"a":1e999}},"clientToken":"x"}', 400, False),
    (b'{"state":{"reported":{"a":123456789012345678901234567890}},"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":{}},"version":"1","clientToken":"x"}', 400, True),
    (b'{"state":{"reported":{}},"version":true,"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":{}},"version":-1,"clientToken":"x"}', 400, True),
    (b'{"state":{"reported":' + b'{"a":' * 50 + b"1" + b"}" * 50 + b'},"clientToken":"x"}', 400, True),
    (b'{"clientToken":"x","state":' + b"[" * 20_000, 400, False),
    (b'{"clientToken":"x","state":{"reported":{"a":"' + b"x" * 33_000 + b'"}}}', 413, True),
]


async def test_what_is_no_request_is_rejected_with_its_token_and_kept(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        await desire(door, "motor-1", {"a": 1})
        for payload, code, has_token in REFUSED:
            door.answers.clear()
            await door.client.publish(shadow_topic("motor-1", "", "update"), payload, qos=1)
            refused = await door.wait_for("motor-1", "update/rejected")
            assert refused["code"] == code, (payload[:80], refused)
            assert (refused.get("clientToken") == "x") is has_token, (payload[:80], refused)
            assert isinstance(refused["timestamp"], int) and refused["timestamp"] < 10**10, "seconds, not milliseconds"
        assert (await report(door, "motor-1", {"b": 1}))["version"] == 2
    assert len(await rows(db, "SELECT FROM quarantine")) == len(REFUSED)


async def test_numbers_that_postgresql_writes_out_in_full_come_back(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        assert (await report(door, "motor-1", {"big": 1e22, "small": 1e-9, "max": 2**63 - 1}))["version"] == 1
        got = await ask(door, "motor-1", "get")
        assert got["state"]["reported"] == {"big": 1e22, "small": 1e-9, "max": 2**63 - 1}
        assert (await desire(door, "motor-1", {"big": 1e22}))["version"] == 2
        assert "delta" not in (await ask(door, "motor-1", "get"))["state"]


async def test_the_shadow_config_is_the_servers(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        answer = await ask(door, "motor-1", "delete", name="config")
        assert answer["code"] == 403 and answer["message"].startswith("Forbidden")
        answer = await desire(door, "motor-1", {"version": 9}, name="config")
        assert answer["code"] == 403
        told = await report(door, "motor-1", {"version": 3, "config": {"a": {"b": 1}}}, name="config")
        assert heard(door, "motor-1", told["clientToken"]) == ["documents", "accepted"]
        assert set(told["metadata"]["reported"]["config"]["a"]["b"]) == {"timestamp"}


async def test_a_barred_device_changes_nothing_and_hears_nothing(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        async with db.pool.connection() as connection:
            await change_access(connection)
            await bar(connection, "motor-1", "alice", "stolen")
        for _ in range(15):
            await send(door, "motor-1", "update", {"state": {"reported": {"a": 1}}})
        assert (await report(door, "motor-2", {"a": 1}))["version"] == 1
        assert "motor-1" not in door.answers
    assert await rows(db, "SELECT device_id FROM shadows") == [("motor-2",)]


async def test_whoever_waits_for_a_report_is_told_and_nobody_else(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        for device in ("motor-1", "motor-2"):
            async with db.pool.connection() as connection:
                await expect(connection, device, f"shadow:{device}//t", {DeviceHappening.SHADOW_REPORTED: None})
        await desire(door, "motor-1", {"a": 1})
        assert await rows(db, "SELECT FROM workflow_outbox") == [], "what is wanted is no report"
        await report(door, "motor-1", {"a": 1}, name="door")
    [(workflow, event)] = await rows(db, "SELECT workflow_id, event FROM workflow_outbox")
    assert (workflow, event["detail"]) == ("shadow:motor-1//t", {"shadow": "door", "version": 1})


# --- too many at once ------------------------------------------------------------------------------------------------


async def flood(db: Database, door: Door, count: int) -> list[dict[str, Any]]:
    """`count` updates of motor-1 and one of motor-2, all before the gateway can answer any; motor-1's answers."""
    async with db.pool.connection() as blocker:
        await blocker.execute("LOCK TABLE devices IN ACCESS EXCLUSIVE MODE")
        first = await send(door, "motor-3", "get")  # a batch that is held up, so that the others gather behind it
        await _until(lambda: not door.gateway.waiting and door.gateway._in_flight.get("motor-3"))
        tokens = [await send(door, "motor-1", "update", {"state": {"reported": {f"k{n}": n}}}) for n in range(count)]
        other = await send(door, "motor-2", "update", {"state": {"reported": {"a": 1}}})
        await _until(lambda: len(door.gateway.waiting) == count + 1)
    answers = [await door.wait_for("motor-1", "ed", token) for token in tokens]
    assert "code" not in await door.wait_for("motor-2", "ed", other)
    await door.wait_for("motor-3", "ed", first)
    assert door.gateway._in_flight == {}
    return answers


async def _until(condition: Any, seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_the_eleventh_request_in_flight_is_rejected_and_not_kept(db: Database, broker: Broker) -> None:
    async with shadow_door(db, broker) as door:
        answers = await flood(db, door, 13)
        assert [answer.get("code") for answer in answers] == [None] * 10 + [429] * 3
        assert (await report(door, "motor-1", {"after": 1}))["version"] == 11, "answered ones count no more"
    assert await rows(db, "SELECT FROM quarantine") == []


async def test_without_the_count_a_flood_goes_through(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.service, "MAX_IN_FLIGHT", 10**9)
    async with shadow_door(db, broker) as door:
        assert [answer.get("code") for answer in await flood(db, door, 13)] == [None] * 13


# --- delivered twice -------------------------------------------------------------------------------------------------


async def deliver(door: Door, topic: str, payload: bytes, duplicate: bool = False) -> None:
    """Give the gateway a message as if its broker had, and wait until it has been used."""
    door.gateway.receive(topic, payload, False, duplicate, (None, b""))
    await ask(door, "motor-1", "get")


async def deliver_twice(door: Door, payload: bytes) -> None:
    """As a broker that got no acknowledgement: the gateway's handler is called again, with the mark of a duplicate."""
    topic = shadow_topic("motor-1", "", "update")
    await deliver(door, topic, payload)
    await deliver(door, topic, payload, duplicate=True)


def _forgetful(real: Any) -> Any:
    async def load(*arguments: Any, **options: Any) -> Any:
        shadows = await real(*arguments, **options)
        for shadow in shadows.values():
            shadow.recent.clear()
        return shadows

    return load


@pytest.mark.parametrize("more", [{"clientToken": "t-1"}, {"version": 1}, {"version": 1, "clientToken": "t-1"}])
async def test_an_update_that_is_delivered_again_is_answered_and_not_applied_again(
    db: Database, broker: Broker, more: dict[str, Any]
) -> None:
    async with shadow_door(db, broker) as door:
        await report(door, "motor-1", {"count": 1})
        await deliver_twice(door, orjson.dumps({"state": {"reported": {"count": 2}}, **more}))
        got = await ask(door, "motor-1", "get")
        answers = [topic.rpartition("/")[2] for topic, _ in door.answers["motor-1"] if "/update/" in topic]
        assert answers == ["documents", "accepted"] * 2 + ["accepted"] and got["version"] == 2
    assert await rows(db, "SELECT count(*) FROM shadow_history") == [(2,)]


async def test_without_the_digests_it_is_applied_twice_or_denied(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway.shadow, "load_shadows", _forgetful(gateway.shadow.load_shadows))
    async with shadow_door(db, broker) as door:
        await deliver_twice(door, orjson.dumps({"state": {"reported": {"a": 2}}, "clientToken": "t-1"}))
        await deliver_twice(door, orjson.dumps({"state": {"reported": {"a": 3}}, "version": 2, "clientToken": "t-2"}))
        assert (await ask(door, "motor-1", "get"))["version"] == 3
        assert (await door.wait_for("motor-1", "rejected", "t-2"))["code"] == 409


async def test_the_same_said_again_is_not_taken_for_a_repetition(db: Database, broker: Broker) -> None:
    """Without the broker's mark; and with it, where the update does not say which one it is."""
    topic, payload = shadow_topic("motor-1", "", "update"), orjson.dumps({"state": {"reported": {"power": "on"}}})
    async with shadow_door(db, broker) as door:
        await deliver(door, topic, payload)
        await report(door, "motor-1", {"power": "off"})
        await deliver(door, topic, payload, duplicate=True)
        assert (await ask(door, "motor-1", "get"))["state"]["reported"] == {"power": "on"}
        for _ in range(2):
            await ask(door, "motor-1", "update", {"state": {"reported": {"power": "on"}}}, token="same")
        assert (await ask(door, "motor-1", "get"))["version"] == 5


class Dying(Gateway):
    """Commits, and dies before it has answered or acknowledged anything."""

    async def _transact(self, inbounds: Any) -> Any:
        await super()._transact(inbounds)
        raise KeyboardInterrupt


async def die_after_commit(db: Database, broker: Broker, fleet: Fleet, client_id: str, payloads: list[bytes]) -> None:
    """A gateway with a session that stays takes updates of motor-1 and ends as with kill -9, between commit and answer."""
    settings = Settings(mqtt_url=f"mqtt://{broker.host}:{broker.port}", database_url=db.url)
    connection = Connection(client_id, keep_session=True)
    gateway = Dying(db, connection, Documents("http://127.0.0.1:1/", fleet.order_key, 3600), settings)
    topic = shadow_topic("motor-1", "", "update")
    await connection.open(settings, (topic,), gateway.receive)
    async with aiomqtt.Client(broker.host, broker.port) as device:
        for payload in payloads:
            await device.publish(topic, payload, qos=1)
    await _until(lambda: len(gateway.waiting) == len(payloads))
    with pytest.raises(KeyboardInterrupt):
        await gateway._transact(gateway.waiting)
    connection._client.set_config({"reconnect_retries": 0})
    connection._client._connection._transport.abort()


@pytest.mark.parametrize("forgetful", [False, True])
async def test_what_was_committed_and_not_acknowledged_is_not_applied_again_by_the_next_gateway(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch, forgetful: bool
) -> None:
    """The broker gives the successor all of it again. Without the digests it counts twice."""
    if broker.kind != "mosquitto":
        pytest.skip("nats-server delivers again after half a minute only")
    fleet, client_id = await prepare(db, 1), f"gateway-dying-{time.monotonic_ns()}"
    payloads = [orjson.dumps({"state": {"reported": {"n": n}}, "clientToken": f"t-{n}"}) for n in range(3)]
    await die_after_commit(db, broker, fleet, client_id, payloads)
    assert await rows(db, "SELECT version FROM shadows") == [(3,)]
    if forgetful:
        monkeypatch.setattr(gateway.shadow, "load_shadows", _forgetful(gateway.shadow.load_shadows))
    async with open_door(db, broker, fleet, client_id) as door:
        await door.client.subscribe(shadow_topic("+", "", "update", "accepted"), qos=0)
        await door.client.subscribe(shadow_topic("+", "", "get", "accepted"), qos=0)
        await report(door, "motor-1", {"after": 1})
        got = await ask(door, "motor-1", "get")
    assert (got["version"], got["state"]["reported"]) == (7 if forgetful else 4, {"n": 2, "after": 1})
    assert await rows(db, "SELECT count(*) FROM shadow_history") == [(7 if forgetful else 4,)]
