"""Devices are asked how they are, and answer: real agents, brokers, gateway, worker, Temporal and PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiomqtt
import orjson
import pytest
import pytest_asyncio
from temporalio.client import Client

import store.diagnostics
from firmware.keys import generate_private_key
from firmware.reboot import REBOOT_PAYLOAD_TYPE
from models.diagnostics import AskOutcome, DiagnosticState
from models.protocol import DiagnosticType, diagnostics_topic
from store.diagnostics import DiagnosticStore
from store.engine import Database
from tests.cli_runner import Ran, run
from tests.conftest import Broker, mosquitto_binary
from tests.integration.diagnostic_setup import Ward, running_broker, ward
from tests.integration.life_setup import alerts, audit_of, rows, waits
from tests.integration.rollout_setup import add_devices
from workflows.lifecycle_client import start_diagnosis

KINDS = [
    pytest.param(
        "mosquitto", marks=pytest.mark.skipif(mosquitto_binary() is None, reason="mosquitto is not installed")
    ),
    "nats",
]
INFO, LOG, CONFIG = DiagnosticType.SYSTEM_INFO, DiagnosticType.LOG_TAIL, DiagnosticType.CONFIG_DUMP
PING, REBOOT = DiagnosticType.PING, DiagnosticType.REBOOT
SHORT = timedelta(seconds=2)


@pytest_asyncio.fixture
async def place(db: Database, temporal: Client, broker: Broker, tmp_path: Path) -> AsyncIterator[Ward]:
    await add_devices(db, 3)
    async with ward(db, temporal, broker, tmp_path) as place:
        yield place


async def say(place: Ward, device_id: str, body: dict[str, Any] | bytes) -> None:
    """As that device, whatever it says."""
    async with aiomqtt.Client(place.broker.host, place.broker.port) as client:
        payload = body if isinstance(body, bytes) else orjson.dumps(body)
        await client.publish(diagnostics_topic(device_id, "response"), payload, qos=1)


async def until(place: Ward, statement: str, wanted: int = 1) -> None:
    async with asyncio.timeout(20):
        while (await rows(place.db, statement))[0]["n"] != wanted:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_device_answers_every_type_on_either_broker(
    db: Database, temporal: Client, kind: str, tmp_path: Path
) -> None:
    await add_devices(db, 1)
    with running_broker(kind) as broker:
        async with ward(db, temporal, broker, tmp_path) as place:
            device = await place.device("motor-1")
            device.log.note("the door is open")
            result, view = await place.ask("motor-1", INFO)
            assert (result.outcome, view.state) == (AskOutcome.ANSWERED, DiagnosticState.ANSWERED)
            assert view.answer is not None and 0 < view.answer["freeMemory"] < view.answer["totalMemory"]
            assert view.answer["uptime"] >= 0 and view.answer["networkStatus"]["connected"] is True
            assert view.answer["diskUsage"]["used"] <= view.answer["diskUsage"]["total"]
            _, view = await place.ask("motor-1", LOG, lines=3)
            assert view.answer is not None and len(view.answer["logs"]) == 3 and view.answer.get("truncated") is None
            _, view = await place.ask("motor-1", LOG, lines=1000)
            assert view.answer is not None and any("the door is open" in line for line in view.answer["logs"])
            _, view = await place.ask("motor-1", CONFIG)
            assert view.answer == {"config": {}, "configVersion": 0}
            _, view = await place.ask("motor-1", PING)
            assert view.answer is not None and view.answer["pong"] is True
            assert await waits(db) == []


async def test_a_device_that_reboots_is_back_under_another_boot_id_and_the_order_is_nowhere_kept(place: Ward) -> None:
    await place.device("motor-1")
    await until(place, "SELECT count(*) AS n FROM presence WHERE boot_id IS NOT NULL")
    [before] = await rows(place.db, "SELECT boot_id FROM presence")
    result, view = await place.ask("motor-1", REBOOT, delay_seconds=1, wait_for_boot=True)
    assert result.outcome is AskOutcome.REBOOTED, result
    assert result.boot_seconds is not None and result.boot_seconds >= 1
    assert view.answer == {"scheduled": True, "delaySeconds": 1}
    [after] = await rows(place.db, "SELECT boot_id FROM presence")
    assert after["boot_id"] != before["boot_id"]
    assert await audit_of(place.db, "motor-1") == ["device.reboot-ordered"]
    assert (await alerts(place.db), await waits(place.db)) == ({}, [])
    kept = await rows(place.db, "SELECT row_to_json(d)::text AS text FROM diagnostics d")
    history = (await place.temporal.get_workflow_handle(place.started[-1]).fetch_history()).to_json()
    assert not any("payloadType" in text or REBOOT_PAYLOAD_TYPE in text for text in (kept[0]["text"], history))


async def test_an_order_that_does_not_hold_is_refused_audited_and_an_alert(
    place: Ward,
) -> None:
    place.order_key = generate_private_key()  # what devices from here on trust, and the gateway does not have
    await place.device("motor-2")
    result, view = await place.ask("motor-2", REBOOT, delay_seconds=0)
    assert (result.outcome, view.state) == (AskOutcome.FAILED, DiagnosticState.FAILED)
    assert "Invalid confirmation token" in result.text
    assert await audit_of(place.db, "motor-2") == ["device.reboot-ordered", "device.reboot-refused"]
    assert await alerts(place.db) == {"reboot-refused": "motor-2"}


async def test_guesses_that_somebody_sends_past_the_server_are_locked_out_audited_and_an_alert(place: Ward) -> None:
    await place.device("motor-1")
    async with aiomqtt.Client(place.broker.host, place.broker.port) as client:
        await client.subscribe(diagnostics_topic("motor-1", "response"))
        for number in range(40):
            guess = {"requestId": f"{number:032x}", "type": "reboot", "delaySeconds": 0, "confirmationToken": "{}"}
            await client.publish(diagnostics_topic("motor-1", "request"), orjson.dumps(guess), qos=1)
            async with asyncio.timeout(10):
                answer = orjson.loads((await anext(client.messages)).payload)  # type: ignore[arg-type]
            assert answer["error"].startswith("Invalid confirmation token" if number < 5 else "locked after 5")
    await until(place, "SELECT count(*) AS n FROM audit_events WHERE action = 'device.reboot-refused'", 5)
    assert await alerts(place.db) == {"reboot-refused": "motor-1"}
    result, _ = await place.ask("motor-1", REBOOT, delay_seconds=0)
    assert (result.outcome, "locked after 5 wrong orders" in result.text) == (AskOutcome.FAILED, True)
    for number in range(50, 70):  # a device that lies about it
        await say(place, "motor-1", {"requestId": f"{number:032x}", "error": "x", "wrongTokens": 1})
        await say(place, "ghost", {"requestId": f"{number:032x}", "error": "x", "wrongTokens": 1})
    result, _ = await place.ask("motor-1", PING)
    audited = await rows(place.db, "SELECT subject FROM audit_events WHERE action = 'device.reboot-refused'")
    assert [row["subject"] for row in audited] == ["motor-1"] * 6, "five guesses, and the order that met the lock"
    assert await rows(place.db, "SELECT FROM quarantine") == []


async def test_a_device_that_is_away_times_out_and_the_text_says_since_when(place: Ward) -> None:
    result, view = await place.ask("motor-3", PING, limit=SHORT)
    assert (result.outcome, view.state) == (AskOutcome.TIMED_OUT, DiagnosticState.TIMED_OUT)
    assert "never sent a heartbeat" in result.text
    async with place.db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO presence (device_id, last_heartbeat) VALUES ('motor-3', now() - interval '1 hour')"
        )
    result, _ = await place.ask("motor-3", PING, limit=SHORT)
    assert "last heard at" in result.text and await waits(place.db) == []
    assert "360" in result.text.split("Z, ")[1]


async def test_an_answer_that_comes_too_late_or_twice_changes_nothing(place: Ward) -> None:
    asked = place.asked("motor-1", INFO, limit=SHORT)
    handle = await start_diagnosis(place.temporal, asked)
    assert (await asyncio.wait_for(handle.result(), 60)).outcome is AskOutcome.TIMED_OUT
    await say(place, "motor-1", {"requestId": asked.request_id, "uptime": 1})
    other = place.asked("motor-1", INFO)
    handle = await start_diagnosis(place.temporal, other)
    await until(place, f"SELECT count(*) AS n FROM diagnostics WHERE request_id = '{other.request_id}'")
    await say(place, "motor-1", {"requestId": other.request_id, "uptime": 2})
    await say(place, "motor-1", {"requestId": other.request_id, "uptime": 3})
    assert (await asyncio.wait_for(handle.result(), 60)).outcome is AskOutcome.ANSWERED
    await say(place, "motor-1", {"requestId": "f" * 32, "uptime": 4})
    await until(place, "SELECT count(*) AS n FROM quarantine", 0)
    questions = DiagnosticStore(place.db)
    late, taken = await questions.get(asked.request_id), await questions.get(other.request_id)
    assert (late.state, late.answer) == (DiagnosticState.TIMED_OUT, None)
    assert taken.answer == {"uptime": 2}


@pytest.mark.parametrize("defended", [True, False])
async def test_another_device_cannot_answer(place: Ward, defended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not defended:
        careless = store.diagnostics._ANSWER.replace("AND d.device_id = n.device_id", "")
        assert careless != store.diagnostics._ANSWER
        monkeypatch.setattr(store.diagnostics, "_ANSWER", careless)
    asked = place.asked("motor-1", INFO, limit=timedelta(seconds=5))
    handle = await start_diagnosis(place.temporal, asked)
    await until(place, "SELECT count(*) AS n FROM diagnostics")
    await say(place, "motor-2", {"requestId": asked.request_id, "uptime": 666})
    result = await asyncio.wait_for(handle.result(), 60)
    view = await DiagnosticStore(place.db).get(asked.request_id)
    if defended:
        assert (result.outcome, view.answer) == (AskOutcome.TIMED_OUT, None)
    else:
        assert (result.outcome, view.answer) == (AskOutcome.ANSWERED, {"uptime": 666})


async def test_two_questions_at_one_time_end_each_with_its_own_answer(place: Ward) -> None:
    await place.device("motor-1")
    results = await asyncio.gather(*(place.ask("motor-1", what) for what in (INFO, LOG, PING, CONFIG)))
    assert [result.outcome for result, _ in results] == [AskOutcome.ANSWERED] * 4
    assert [view.type for _, view in results] == [INFO, LOG, PING, CONFIG]


async def test_a_barred_device_is_not_asked_and_its_answer_is_not_taken(place: Ward) -> None:
    asked = place.asked("motor-1", INFO, limit=SHORT)
    handle = await start_diagnosis(place.temporal, asked)
    await until(place, "SELECT count(*) AS n FROM diagnostics")
    async with place.db.pool.connection() as connection:
        await connection.execute(
            "UPDATE devices SET barred_at = now(), barred_reason = 'x' WHERE device_id = 'motor-1'"
        )
    await say(place, "motor-1", {"requestId": asked.request_id, "uptime": 1})
    assert (await asyncio.wait_for(handle.result(), 60)).outcome is AskOutcome.TIMED_OUT
    again = await start_diagnosis(place.temporal, place.asked("motor-1", INFO))
    refused = await asyncio.wait_for(again.result(), 60)
    assert refused.outcome is AskOutcome.REFUSED and "nothing that it says is used" in refused.text


async def test_answers_that_are_no_answers_are_quarantined_and_the_question_stays_open(place: Ward) -> None:
    asked = place.asked("motor-1", INFO, limit=timedelta(seconds=10))
    handle = await start_diagnosis(place.temporal, asked)
    await until(place, "SELECT count(*) AS n FROM diagnostics")
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    wrong: list[dict[str, Any] | bytes] = [
        b"not JSON",
        {"requestId": asked.request_id},
        {"requestId": asked.request_id, "a": deep},
        {"requestId": asked.request_id, "a": "x" * 5000},
        {"requestId": asked.request_id, "a": [1] * 6000},
        {"requestId": asked.request_id, "k" * 200: 1},
        {"requestId": asked.request_id, "error": "x" * 600},
        {"requestId": asked.request_id, "error": 5},
        {"requestId": asked.request_id.upper(), "a": 1},
        f'{{"requestId":"{asked.request_id}","a":"\\u0000"}}'.encode(),
        f'{{"requestId":"{asked.request_id}","a":1,"a":2}}'.encode(),
    ]
    for body in wrong:
        await say(place, "motor-1", body)
    await until(place, "SELECT count(*) AS n FROM quarantine", len(wrong))
    assert (await rows(place.db, "SELECT state FROM diagnostics"))[0]["state"] == "requested"
    await say(place, "motor-1", {"requestId": asked.request_id, "uptime": 5})
    assert (await asyncio.wait_for(handle.result(), 60)).outcome is AskOutcome.ANSWERED


async def test_the_agent_survives_questions_that_are_none(place: Ward) -> None:
    await place.device("motor-1")
    async with aiomqtt.Client(place.broker.host, place.broker.port) as client:
        for payload in (b"", b"[]", b"{", b"null", orjson.dumps({"requestId": 5}), orjson.dumps({"type": "ping"}),
                        orjson.dumps({"requestId": "g" * 32, "type": "ping"}), b"x" * 40_000):  # fmt: skip
            await client.publish(diagnostics_topic("motor-1", "request"), payload, qos=1)
    result, _ = await place.ask("motor-1", PING)
    assert result.outcome is AskOutcome.ANSWERED


async def test_the_command_line_asks_shows_and_waits_for_a_reboot(place: Ward) -> None:
    await place.device("motor-1")
    environment = {
        "TIDEGATE_DATABASE_URL": place.db.url,
        "TIDEGATE_TEMPORAL_ADDRESS": place.temporal.service_client.config.target_host,
        "TIDEGATE_ACTOR": "anna",
    }

    async def command(*words: str) -> Ran:
        return await asyncio.to_thread(run, "diagnose", *words, **environment)

    shown = await command("motor-1", "system-info")
    assert shown.status == 0 and "uptime" in shown.out and "free (" in shown.out and "used (" in shown.out
    shown = await command("motor-1", "log-tail", "--lines", "5")
    assert shown.status == 0 and "asked for 'system-info': answered" in shown.out
    shown = await command("motor-1", "ping", "--json")
    assert (shown.json["outcome"], shown.json["requested_by"]) == ("answered", "anna")
    await until(place, "SELECT count(*) AS n FROM presence WHERE boot_id IS NOT NULL")
    shown = await command("motor-1", "reboot", "--delay", "0s", "--wait", "--reason", "it hangs")
    assert shown.status == 0 and "motor-1 has rebooted" in shown.out, shown
    shown = await command("motor-1", "reboot", "--delay", "1m", "--json")
    assert shown.json["answer"] == {"scheduled": True, "delaySeconds": 60}
    shown = await command("motor-1")
    assert all(each.value in shown.out for each in DiagnosticType if each is not CONFIG)
    refused = await command("ghost", "ping")
    assert refused.status == 2 and "no device with the id 'ghost'" in refused.err
