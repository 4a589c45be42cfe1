"""Alerts of what is gone: a device that was decommissioned, a site without devices; nobody is left to end them."""

from datetime import timedelta

import pytest

import store.decommission
import store.offline
from models.alerting import AlertRuleSpec
from models.lifecycle import RetireDeviceInput
from store.alert_rules import AlertRuleStore
from store.alerts import AlertStore, raise_alert
from store.decommission import DecommissionStore
from store.engine import Database
from store.offline import sweep_offline
from tests.integration.life_setup import add_authority
from tests.integration.rollout_setup import add_devices
from tests.integration.test_heartbeats_kept import rows
from tests.integration.test_offline import hear, heard, offline, standing, sweep

RETIRE = RetireDeviceInput(device_id="motor-1", actor="alice", reason="scrapped")


async def retired_while_hot(db: Database) -> list[tuple[str, str]]:
    """What stands of a device that was decommissioned while a rule's alert on it did."""
    await add_authority(db)
    await add_devices(db, 2)
    await AlertRuleStore(db).set(AlertRuleSpec.model_validate({"name": "hot", "when": "cpuTemperature > 80"}), "alice")
    async with db.pool.connection() as connection:
        for device in ("motor-1", "motor-2"):
            await connection.execute("INSERT INTO alert_progress VALUES (%s, 'hot', true, 0, NULL)", (device,))
            await raise_alert(connection, "hot", device, "it is hot")
        await raise_alert(connection, "reboot-refused", "motor-1", "somebody tries")
    await DecommissionStore(db).retire(RETIRE)
    left = await rows(db, "SELECT device_id FROM alert_progress ORDER BY device_id")
    return sorted([*await standing(db), *(("progress", device) for (device,) in left)])


async def test_a_decommissioned_devices_alerts_of_rules_are_over(db: Database) -> None:
    """Those of attacks on it are not: somebody has to look at them all the same."""
    assert await retired_while_hot(db) == [("hot", "motor-2"), ("progress", "motor-2"), ("reboot-refused", "motor-1")]


async def test_without_it_they_would_stand_for_ever(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(*_: object) -> None:
        return None

    monkeypatch.setattr(store.decommission, "resolve_judged", nothing)
    assert ("hot", "motor-1") in await retired_while_hot(db)


async def emptied_site(db: Database) -> list[tuple[str, str]]:
    """What stands when the devices of a site that was offline have left it."""
    await add_devices(db, 30)
    await hear(db)
    for number in range(1, 31):
        await heard(db, f"motor-{number}", 20)
    await sweep(db)
    assert ("site-offline", "site:berlin") in await standing(db)
    await rows(db, "UPDATE devices SET site_id = 'hamburg' RETURNING 1")
    await sweep(db)
    return [(rule, subject) for rule, subject in await standing(db) if rule == "site-offline"]


async def test_a_site_without_devices_is_not_offline(db: Database) -> None:
    assert await emptied_site(db) == [("site-offline", "fleet"), ("site-offline", "site:hamburg")]


async def test_if_only_sites_with_devices_were_looked_at_it_would_stay_so(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    statement = store.offline._NOBODY_LEFT
    monkeypatch.setattr(store.offline, "_NOBODY_LEFT", statement + " AND false")
    assert ("site-offline", "site:berlin") in await emptied_site(db)


async def test_a_pulse_from_the_future_is_none(db: Database) -> None:
    """PostgreSQL's clock was set back an hour while nobody listened: what the last pulse said has not come true."""
    await add_devices(db, 1)
    await hear(db)
    await heard(db, "motor-1", 20)
    await rows(db, "UPDATE ingest_state SET pulsed_at = now() + interval '1 hour' RETURNING 1")
    async with db.pool.connection() as connection:
        found = await sweep_offline(connection, timedelta(minutes=10))
    assert not found.listening and await offline(db) == []
    assert [alert.rule for alert in await AlertStore(db).find()] == ["ingest-silent"]
