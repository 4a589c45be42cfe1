"""Heartbeats judged in the gateway, on a real broker and a real PostgreSQL: which alerts open, and which do not."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

import gateway.alerting
import gateway.service
from gateway.service import Gateway
from models.alerting import AlertRuleSpec
from models.protocol import heartbeat_topic
from store.alert_rules import AlertRuleStore
from store.alerts import AlertStore
from store.devicetraffic import Saved
from store.engine import Database
from tests.cli_runner import run
from tests.conftest import Broker
from tests.integration.rollout_setup import prepare
from tests.integration.test_gateway_identity import rows, until
from tests.integration.test_gateway_jobs import Door, open_door

HOT = "cpuTemperature > 80 for 2 heartbeats, clear < 75 for 3 heartbeats"
CLOCK = itertools.count(int(time.time() * 1000), 1000)


def rule(when: str = HOT, name: str = "overheating", **more: Any) -> AlertRuleSpec:
    return AlertRuleSpec.model_validate({"name": name, "when": when, "severity": "critical", **more})


@pytest.fixture(autouse=True)
def read_rules_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every batch, so that no test waits."""
    monkeypatch.setattr(gateway.alerting, "REFRESH_SECONDS", 0.0)


@asynccontextmanager
async def judging(db: Database, broker: Broker, *rules: AlertRuleSpec, devices: int = 4) -> AsyncIterator[Door]:
    """A gateway with these rules."""
    fleet = await prepare(db, devices)
    for each in rules or (rule(),):
        await AlertRuleStore(db).set(each, "alice")
    async with open_door(db, broker, fleet) as door:
        yield door


async def beat(
    door: Door, thing: str, value: float | None, *, at: int | None = None, key: str = "cpuTemperature"
) -> int:
    """One heartbeat, when it has been committed. Returns its time."""
    moment = next(CLOCK) if at is None else at
    said = {"timestamp": moment} | ({} if value is None else {key: value})
    await door.client.publish(heartbeat_topic(thing), orjson.dumps(said), qos=1)
    await used(door)
    return moment


async def used(door: Door) -> None:
    """What was published before has been committed: a request behind it has been answered."""
    await door.ask("motor-1", "get")


async def beats(door: Door, thing: str, *values: float | None) -> None:
    for value in values:
        await beat(door, thing, value)


async def alerts(db: Database) -> list[tuple[Any, ...]]:
    return await rows(db, "SELECT rule, subject, state, occurrences, severity FROM alerts ORDER BY alert_no")


async def test_two_heartbeats_open_one_alert_and_a_hundred_more_none(db: Database, broker: Broker) -> None:
    async with judging(db, broker) as door:
        await beat(door, "motor-1", 81)
        assert await alerts(db) == []
        await beat(door, "motor-1", 82.5)
        assert await alerts(db) == [("overheating", "motor-1", "open", 1, "critical")]
        for _ in range(100):
            said = orjson.dumps({"timestamp": next(CLOCK), "cpuTemperature": 90})
            await door.client.publish(heartbeat_topic("motor-1"), said, qos=1)
        await used(door)
        assert await alerts(db) == [("overheating", "motor-1", "open", 101, "critical")]
        [found] = await AlertStore(db).find()
        assert found.text == "motor-1: cpuTemperature is 90; cpuTemperature > 80 for 2 heartbeats"
        assert await rows(db, "SELECT event FROM alert_notifications") == [("open",)]
        assert await rows(db, "SELECT device_id, firing FROM alert_progress") == [("motor-1", True)]


async def test_it_is_over_after_three_below_and_comes_again_as_another(db: Database, broker: Broker) -> None:
    async with judging(db, broker) as door:
        await beats(door, "motor-1", 81, 81, 76, 70, 70, 78, 70, None, 70)
        assert [state for _, _, state, _, _ in await alerts(db)] == ["open"]
        await beat(door, "motor-1", 70)
        assert [state for _, _, state, _, _ in await alerts(db)] == ["resolved"]
        assert await rows(db, "SELECT FROM alert_progress") == []
        assert await rows(db, "SELECT resolved_by FROM alerts") == [("gateway",)]
        await beats(door, "motor-1", 81, 81)
        assert [state for _, _, state, _, _ in await alerts(db)] == ["resolved", "open"]
        assert await rows(db, "SELECT event FROM alert_notifications ORDER BY notification_no") == [
            ("open",),
            ("resolved",),
            ("open",),
        ]


async def test_a_value_that_wavers_within_the_band_gives_one_alert(db: Database, broker: Broker) -> None:
    async with judging(db, broker) as door:
        await beats(door, "motor-1", 81, 81, *([76, 81] * 10))
        assert await alerts(db) == [("overheating", "motor-1", "open", 11, "critical")]


async def test_one_batch_may_hold_all_of_an_alert(db: Database, broker: Broker) -> None:
    async with judging(db, broker) as door:
        for value in (81, 81, 81, 70, 70, 70, 81, 81):
            said = orjson.dumps({"timestamp": next(CLOCK), "cpuTemperature": value})
            await door.client.publish(heartbeat_topic("motor-1"), said, qos=1)
        await used(door)
        assert [row[2:4] for row in await alerts(db)] == [("resolved", 2), ("open", 1)]


async def test_a_rule_is_for_its_devices_alone(db: Database, broker: Broker) -> None:
    only = rule("cpuTemperature > 80", target={"type": "motor", "sites": ["hamburg"], "tags": {"env": "production"}})
    async with judging(db, broker, only, rule("load > 0.9", "loaded"), devices=4) as door:
        async with db.pool.connection() as connection:
            await connection.execute("UPDATE devices SET site_id = 'hamburg' WHERE device_id IN ('motor-2', 'motor-3')")
            await connection.execute(
                """UPDATE devices SET tags = '{"env": "production"}' WHERE device_id <> 'motor-3'"""
            )
        for thing in ("motor-1", "motor-2", "motor-3", "stranger"):
            await beat(door, thing, 99)
        assert [row[:2] for row in await alerts(db)] == [("overheating", "motor-2")]
        await beat(door, "motor-4", 0.95, key="load")
        assert [row[:2] for row in await alerts(db)] == [("overheating", "motor-2"), ("loaded", "motor-4")]
        async with db.pool.connection() as connection:
            await connection.execute("UPDATE devices SET site_id = 'berlin' WHERE device_id = 'motor-2'")
        await beat(door, "motor-2", 99)
        assert [row[2] for row in await alerts(db)] == ["resolved", "open"], "the rule is not for it any more"


async def test_a_rule_that_changes_is_judged_by_as_it_is(db: Database, broker: Broker) -> None:
    store = AlertRuleStore(db)
    async with judging(db, broker) as door:
        await beat(door, "motor-1", 81)
        await store.set(rule("cpuTemperature > 85 for 2 heartbeats"), "bob")
        await beats(door, "motor-1", 86, 84, 86)
        assert await alerts(db) == []
        await beat(door, "motor-1", 86)
        assert [row[2] for row in await alerts(db)] == ["open"]
        await store.set(rule("cpuTemperature > 95"), "bob")
        await beat(door, "motor-1", 90)
        assert [row[2] for row in await alerts(db)] == ["resolved"]
        await beat(door, "motor-1", 96)
        assert [row[2] for row in await alerts(db)] == ["resolved", "open"]
        await store.enable("overheating", False, "bob")
        assert [row[2] for row in await alerts(db)] == ["resolved", "resolved"]
        await beat(door, "motor-1", 99)
        await store.enable("overheating", True, "bob")
        await beat(door, "motor-1", 99)
        await store.delete("overheating", "bob")
        await beats(door, "motor-1", 99, 99)
        assert [row[2] for row in await alerts(db)] == ["resolved"] * 3
        assert await rows(db, "SELECT FROM alert_progress") == []


async def test_a_rule_that_was_deleted_a_moment_ago_opens_nothing(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with judging(db, broker, rule("cpuTemperature > 80")) as door:
        await beat(door, "motor-1", 50)
        monkeypatch.setattr(gateway.alerting, "REFRESH_SECONDS", 3600.0)
        await AlertRuleStore(db).delete("overheating", "bob")
        assert door.gateway.judge.rules, "the gateway has not heard of it"
        await beat(door, "motor-1", 99)
        assert await alerts(db) == []


async def test_a_gateway_that_believes_its_rules_opens_what_nobody_closes(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with judging(db, broker, rule("cpuTemperature > 80")) as door:
        await beat(door, "motor-1", 50)
        monkeypatch.setattr(gateway.alerting, "REFRESH_SECONDS", 3600.0)
        known = {each.spec.name: each.revision for each in door.gateway.judge.rules}

        async def believing(_: Any) -> dict[str, int]:
            return known

        monkeypatch.setattr(gateway.alerting, "lock_rules", believing)
        await AlertRuleStore(db).delete("overheating", "bob")
        await beat(door, "motor-1", 99)
        assert [row[2] for row in await alerts(db)] == ["open"]


async def test_a_heartbeat_that_comes_again_counts_once(db: Database, broker: Broker) -> None:
    async with judging(db, broker) as door:
        at = await beat(door, "motor-1", 81)
        for _ in range(3):
            await beat(door, "motor-1", 81, at=at)
        assert await alerts(db) == []
        await beat(door, "motor-1", 81)
        await beat(door, "motor-1", 81, at=at)
        assert await alerts(db) == [("overheating", "motor-1", "open", 1, "critical")]


async def test_a_gateway_that_does_not_ask_what_it_has_heard_before_counts_twice(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = gateway.service.save_heartbeats

    async def forgetful(connection: Any, said: Any) -> Saved:
        return Saved((await save(connection, said)).clones, frozenset())

    monkeypatch.setattr(gateway.service, "save_heartbeats", forgetful)
    async with judging(db, broker) as door:
        at = await beat(door, "motor-1", 81)
        await beat(door, "motor-1", 81, at=at)
        assert [row[2] for row in await alerts(db)] == ["open"]


async def test_a_batch_that_is_tried_again_counts_once(
    db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with judging(db, broker, rule("cpuTemperature > 80 for 3 heartbeats")) as door:
        transact, failed = Gateway._transact, []

        async def failing(gateway: Gateway, inbounds: Any) -> Any:
            if len(failed) < 2:
                failed.append(1)
                async with gateway.db.pool.connection() as connection:
                    await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
            return await transact(gateway, inbounds)

        monkeypatch.setattr(Gateway, "_transact", failing)
        await beats(door, "motor-1", 81, 81)
        assert await alerts(db) == [] and failed
        await beat(door, "motor-1", 81)
        assert [row[2] for row in await alerts(db)] == ["open"]


async def test_acknowledged_stays_acknowledged_and_resolved_by_hand_begins_anew(db: Database, broker: Broker) -> None:
    store = AlertStore(db)
    async with judging(db, broker) as door:
        await beats(door, "motor-1", 81, 81)
        await store.acknowledge([1], "alice")
        await beats(door, "motor-1", 81, 81)
        assert [row[2:4] for row in await alerts(db)] == [("acknowledged", 3)]
        await store.resolve([1], "alice")
        await beat(door, "motor-1", 81)
        assert [row[2] for row in await alerts(db)] == ["resolved"]
        await beat(door, "motor-1", 81)
        assert [row[2] for row in await alerts(db)] == ["resolved", "open"]


async def test_a_barred_device_opens_nothing(db: Database, broker: Broker) -> None:
    async with judging(db, broker, rule("cpuTemperature > 80")) as door:
        async with db.pool.connection() as connection:
            await connection.execute(
                "UPDATE devices SET barred_at = now(), barred_reason = 'x' WHERE device_id = 'motor-2'"
            )
        await beat(door, "motor-2", 99)
        assert await alerts(db) == []


async def test_a_rule_that_cannot_be_read_holds_up_no_other(db: Database, broker: Broker) -> None:
    async with judging(db, broker, rule("cpuTemperature > 80")) as door:
        async with db.pool.connection() as connection:
            await connection.execute("INSERT INTO alert_rules (name, spec) VALUES ('odd', '{}')")
        await beat(door, "motor-1", 99)
        assert [row[0] for row in await alerts(db)] == ["overheating"]


async def test_a_fleet_that_fails_alike_is_listed_as_one_and_taken_as_one(
    db: Database, broker: Broker, tmp_path: Any
) -> None:
    environment = {"TIDEGATE_DATABASE_URL": db.url, "TIDEGATE_STATE_DIR": str(tmp_path), "TIDEGATE_ACTOR": "carol"}

    async def command(*words: str, status: int = 0) -> Any:
        ran = await asyncio.to_thread(run, *words, **environment)
        assert ran.status == status, ran.err
        return ran

    async def listed(*words: str) -> Any:
        return (await command("alert", "list", "--json", *words)).json

    async with judging(
        db, broker, rule("cpuTemperature > 80"), rule("load > 1", "loaded", severity="info"), devices=30
    ) as door:
        async with db.pool.connection() as connection:
            await connection.execute("UPDATE devices SET site_id = 'hamburg' WHERE device_id IN ('motor-7', 'motor-8')")
        for number in range(1, 21):
            said = orjson.dumps({"timestamp": next(CLOCK), "cpuTemperature": 99})
            await door.client.publish(heartbeat_topic(f"motor-{number}"), said, qos=1)
        await used(door)
        await beat(door, "motor-9", 2, key="load")
        found = await listed()
        assert [(group["rule"], group["count"]) for group in found["groups"]] == [("loaded", 1), ("overheating", 20)]
        assert found["groups"][1]["sites"] == {"berlin": 18, "hamburg": 2}
        assert [alert["rule"] for alert in found["alerts"]] == ["loaded"]
        text = (await command("alert", "list")).out
        assert "overheating" in text and "berlin=18, hamburg=2" in text and "motor-12" not in text
        assert len((await listed("--all"))["alerts"]) == 21
        assert len((await listed("--rule", "overheating"))["alerts"]) == 20
        assert len((await listed("--site", "hamburg", "--all"))["alerts"]) == 2
        assert {alert["rule"] for alert in (await listed("--severity", "critical", "--all"))["alerts"]} == {
            "overheating"
        }
        assert len((await listed("--device", "motor-9"))["alerts"]) == 2
        refused = await command("alert", "resolve", "--rule", "overheating", "--all", status=2)
        assert "20 alerts match" in refused.err and "--count 20" in refused.err
        refused = await command("alert", "resolve", "--rule", "overheating", "--all", "--count", "3", status=2)
        assert "--count says 3" in refused.err and len(await listed()) == 2
        await command("alert", "acknowledge", "--rule", "overheating", "--all", "--count", "20")
        assert {row[2] for row in await alerts(db)} == {"acknowledged", "open"}
        await command("alert", "resolve", "--rule", "overheating", "--all", "--count", "20")
        assert [group["rule"] for group in (await listed())["groups"]] == ["loaded"]
        shown = (await command("alert", "show", "1", "--json")).json
        assert [told["event"] for told in shown["told"]] == ["open", "acknowledged", "resolved"]
        assert (shown["acknowledged_by"], shown["severity"]) == ("carol", "critical")
        await command("alert", "show", "999", status=2)


async def test_rules_are_set_shown_tried_and_deleted_by_commands(db: Database, broker: Broker, tmp_path: Any) -> None:
    environment = {"TIDEGATE_DATABASE_URL": db.url, "TIDEGATE_STATE_DIR": str(tmp_path), "TIDEGATE_ACTOR": "carol"}

    async def command(*words: str, status: int = 0) -> Any:
        ran = await asyncio.to_thread(run, "alert", "rule", *words, "--json", **environment)
        assert ran.status == status, ran.err
        return ran.json

    async with judging(db, broker, rule("cpuTemperature > 200", "unreachable")) as door:
        await command(
            "set", "hot", HOT, "--severity", "critical", "--type", "motor", "--site", "berlin", "--tag", "a=b"
        )
        file = tmp_path / "load.yaml"
        file.write_text("name: loaded\nwhen: load > 0.9 for 10m\n")
        await command("set", "--file", str(file))
        listed = (await command("list"))["rules"]
        assert [(one["spec"]["name"], one["when"]) for one in listed] == [
            ("hot", HOT),
            ("loaded", "load > 0.9 for 10m"),
            ("unreachable", "cpuTemperature > 200"),
        ]
        shown = await command("show", "hot")
        assert shown["spec"]["target"]["tags"] == {"a": "b"} and shown["created_by"] == "carol"
        wrong = await command("set", "Hot", "cpuTemperature is warm", status=2)
        assert "expected one of > >= < <= == !=" in wrong["error"]["message"]
        await command("set", "hot", status=2)
        await beats(door, "motor-1", 81, 81, 70, 70, 70, 81, 81)
        await beats(door, "motor-2", 81, 60)
        await until(lambda: rows(db, "SELECT FROM heartbeats OFFSET 8"))
        tried = await command("test", "trial", HOT, "--since", "1d")
        assert [tried[key] for key in ("heartbeats", "devices", "alerting", "alerts", "still_open", "first")] == [
            9,
            2,
            1,
            2,
            1,
            ["motor-1"],
        ]
        assert (await command("test", "unreachable"))["alerts"] == 0
        assert (await command("test", "trial", "load > 1"))["heartbeats"] == 0
        assert await alerts(db) == []
        await command("disable", "hot")
        await command("enable", "hot")
        await command("delete", "hot")
        await command("delete", "hot", status=2)
        await command("test", "hot", status=2)
