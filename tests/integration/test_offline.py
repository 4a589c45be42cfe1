"""Who is offline, as the sweep sees it: by limits of types, with alerts, and only of silence that was listened to."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import store.offline
from domain.presence import Coverage, is_offline
from models.device import DeviceFilter, DeviceStatus
from store.alerts import AlertStore
from store.engine import Database
from store.offline import Sweep, sweep_offline
from store.registry import Registry
from tests.integration.rollout_setup import add_devices
from tests.integration.test_heartbeats_kept import heartbeat, rows, save

LIMIT = timedelta(minutes=10)


async def hear(db: Database, minutes: float = 600) -> None:
    """The gateway's pulse has come all this time, and just now."""
    await rows(
        db,
        "INSERT INTO ingest_state VALUES ('gateway', now() - make_interval(secs => %s), now()) ON CONFLICT (source) "
        "DO UPDATE SET covered_since = excluded.covered_since, pulsed_at = excluded.pulsed_at RETURNING 1",
        minutes * 60,
    )


async def heard(db: Database, thing: str, minutes_ago: float = 0) -> None:
    """A heartbeat, so long ago."""
    await save(db, heartbeat(None, thing))
    await rows(
        db,
        "UPDATE presence SET last_heartbeat = now() - make_interval(secs => %s) WHERE device_id = %s RETURNING 1",
        minutes_ago * 60,
        thing,
    )


async def sweep(db: Database, limit: timedelta = LIMIT) -> Sweep:
    async with db.pool.connection() as connection:
        return await sweep_offline(connection, limit)


async def offline(db: Database) -> list[str]:
    found = await rows(db, "SELECT device_id FROM presence WHERE offline_since IS NOT NULL ORDER BY device_id")
    return [row[0] for row in found]


async def standing(db: Database) -> list[tuple[str, str]]:
    return sorted((alert.rule, alert.subject) for alert in await AlertStore(db).find())


async def test_a_device_is_offline_beyond_its_limit_and_back_when_it_is_heard(db: Database) -> None:
    await add_devices(db, 3)
    await hear(db)
    await heard(db, "motor-1", 9.9)
    await heard(db, "motor-2", 10.1)
    assert await sweep(db) == Sweep(True, 1, 0, ())
    assert await offline(db) == ["motor-2"], "motor-3 was never heard, which is another thing"
    [alert] = await AlertStore(db).find()
    assert (alert.rule, alert.subject, alert.occurrences) == ("device-offline", "motor-2", 1)
    assert "motor-2 of site berlin is silent, its limit is 10 min; last heard 20" in alert.text
    assert await sweep(db) == Sweep(True, 0, 0, ()), "once"
    assert [row[0] for row in await rows(db, "SELECT DISTINCT status FROM devices")] == ["active"]
    await save(db, heartbeat(None, "motor-2"))
    assert await sweep(db) == Sweep(True, 0, 1, ())
    assert await offline(db) == [] and await standing(db) == []
    [resolved] = await AlertStore(db).find(everything=True)
    assert (resolved.state, resolved.resolved_by) == ("resolved", "upkeep")


async def test_a_type_has_a_limit_of_its_own_and_a_new_one_holds_at_once(db: Database) -> None:
    await add_devices(db, 1)
    await add_devices(db, 1, "pump")
    await rows(db, "UPDATE devices SET device_type = 'pump' WHERE device_id = 'pump-1' RETURNING 1")
    await rows(db, "INSERT INTO device_types VALUES ('pump', 120), ('motor', NULL) RETURNING 1")
    await hear(db)
    await heard(db, "motor-1", 5)
    await heard(db, "pump-1", 5)
    await sweep(db)
    assert await offline(db) == ["pump-1"]
    await rows(db, "UPDATE device_types SET offline_after_seconds = 3600 WHERE device_type = 'pump' RETURNING 1")
    assert (await sweep(db, timedelta(minutes=4))).back == 1
    assert await offline(db) == ["motor-1"]


async def test_retired_and_barred_devices_are_left_out_and_taken_out(db: Database) -> None:
    await add_devices(db, 4)
    await hear(db)
    for thing in ("motor-1", "motor-2", "motor-3", "motor-4"):
        await heard(db, thing, 20)
    await rows(db, "UPDATE devices SET status = 'retired' WHERE device_id = 'motor-1' RETURNING 1")
    await rows(db, "UPDATE devices SET barred_at = now() WHERE device_id = 'motor-2' RETURNING 1")
    await sweep(db)
    assert await offline(db) == ["motor-3", "motor-4"]
    await rows(db, "UPDATE devices SET status = 'retired' WHERE device_id = 'motor-3' RETURNING 1")
    await rows(db, "UPDATE devices SET barred_at = now() WHERE device_id = 'motor-4' RETURNING 1")
    await sweep(db)
    assert await offline(db) == [] and await standing(db) == []


@pytest.mark.parametrize("covered_minutes", [1, 9, 11, 30])
async def test_the_statement_goes_by_the_rule(db: Database, covered_minutes: int) -> None:
    await add_devices(db, 30)
    await hear(db, covered_minutes)
    for number in range(1, 31):
        await heard(db, f"motor-{number}", number - 0.5)
    await sweep(db)
    now = datetime.now(UTC)
    covered = Coverage(now - timedelta(minutes=covered_minutes), now)
    expected = [f"motor-{n}" for n in range(1, 31) if is_offline(now - timedelta(minutes=n - 0.5), LIMIT, covered, now)]
    assert await offline(db) == sorted(expected) and bool(expected) == (covered_minutes > 10)


async def after_an_outage(db: Database) -> list[str]:
    """Devices last heard 20 minutes ago; the gateway was away since, and hears again for two minutes."""
    await add_devices(db, 3)
    for thing in ("motor-1", "motor-2", "motor-3"):
        await heard(db, thing, 20)
    await hear(db, 2)
    await sweep(db)
    return await offline(db)


async def test_after_an_outage_every_device_has_its_whole_limit_again(db: Database) -> None:
    assert await after_an_outage(db) == []
    await hear(db, 10.1)
    await heard(db, "motor-2", 1)
    await sweep(db)
    assert await offline(db) == ["motor-1", "motor-3"]


async def test_without_the_coverage_the_whole_fleet_is_declared_offline(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    careless = store.offline._MARK.replace("greatest(p.last_heartbeat, (SELECT covered_since FROM heard))",
                                           "p.last_heartbeat")  # fmt: skip
    assert careless != store.offline._MARK
    monkeypatch.setattr(store.offline, "_MARK", careless)
    assert await after_an_outage(db) == ["motor-1", "motor-2", "motor-3"]


async def test_while_nobody_listens_nobody_is_declared_offline_and_that_is_an_alert(db: Database) -> None:
    await add_devices(db, 1)
    assert (await sweep(db)).listening is False
    assert await standing(db) == [], "nothing is expected to be heard yet"
    await heard(db, "motor-1", 20)
    await hear(db)
    await rows(db, "UPDATE ingest_state SET pulsed_at = now() - interval '45 seconds' RETURNING 1")
    swept = await sweep(db)
    assert (swept.listening, swept.offline) == (False, 0)
    assert "the gateway's pulse has not come through the broker for 45 s" in swept.alerts[0]
    assert await standing(db) == [("ingest-silent", "gateway")]
    assert await rows(db, "SELECT severity FROM alerts") == [("critical",)]
    await sweep(db)
    assert (await AlertStore(db).find())[0].occurrences == 1
    await hear(db, 1)
    await sweep(db)
    assert await standing(db) == []


async def test_many_devices_of_a_site_at_once_are_an_alert_of_the_site_too(db: Database) -> None:
    await add_devices(db, 60)
    await rows(db, "UPDATE devices SET site_id = 'paris' WHERE device_id > 'motor-3' RETURNING 1")
    counts = dict(await rows(db, "SELECT site_id, count(*) FROM devices GROUP BY site_id"))
    await hear(db)
    for number in range(1, 61):
        await heard(db, f"motor-{number}", 0)
    await rows(
        db, "UPDATE presence SET last_heartbeat = now() - interval '1 hour' WHERE device_id <= 'motor-3' RETURNING 1"
    )
    swept = await sweep(db)
    assert swept.offline == counts["berlin"] > 20
    assert f"{counts['berlin']} of {counts['berlin']} devices of site berlin are offline (100%)" in swept.alerts
    assert [subject for rule, subject in await standing(db) if rule == "site-offline"] == ["fleet", "site:berlin"]
    assert await rows(db, "SELECT count(*) FROM alerts WHERE rule = 'device-offline'") == [(counts["berlin"],)]
    await rows(db, "UPDATE presence SET last_heartbeat = now() RETURNING 1")
    await sweep(db)
    assert await standing(db) == []


async def test_a_device_that_is_speaking_at_this_moment_is_not_marked_nor_waited_for(db: Database) -> None:
    await add_devices(db, 2)
    await hear(db)
    await heard(db, "motor-1", 20)
    await heard(db, "motor-2", 20)
    async with db.pool.connection() as batch:
        await batch.execute("UPDATE presence SET last_heartbeat = now() WHERE device_id = 'motor-1'")
        async with asyncio.timeout(5):
            await sweep(db)
    assert await offline(db) == ["motor-2"]


async def test_the_registry_finds_devices_that_are_offline(db: Database) -> None:
    await add_devices(db, 3)
    await hear(db)
    await heard(db, "motor-2", 20)
    await heard(db, "motor-1")
    await sweep(db)
    page: Any = await Registry(db).find(DeviceFilter(), offline=True)
    assert [device.device_id for device in page.devices] == ["motor-2"] and page.total == 1
    device = await Registry(db).get("motor-2")
    assert device.offline_since is not None and device.status is DeviceStatus.ACTIVE
