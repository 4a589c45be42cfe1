"""`health`, `device health`, `device list --offline`, `device show`, `device-type`: what a person is told."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cli.health import sparkline
from store.engine import Database
from tests.cli_runner import run
from tests.integration.rollout_setup import add_devices
from tests.integration.test_heartbeats_kept import heartbeat, rows, save
from tests.integration.test_offline import hear, heard, sweep


@pytest.fixture
def ask(db: Database, tmp_path: Path) -> Any:
    """Run a command on this database."""
    environment = {"TIDEGATE_DATABASE_URL": db.url, "TIDEGATE_STATE_DIR": str(tmp_path)}

    async def ask(*words: str) -> Any:
        return await asyncio.to_thread(lambda: run(*words, **environment))

    return ask


async def test_the_fleet_is_counted_by_site_and_type_with_whether_anybody_listens(db: Database, ask: Any) -> None:
    await add_devices(db, 4)
    await rows(db, "UPDATE devices SET site_id = 'paris', device_type = 'pump' WHERE device_id = 'motor-3' RETURNING 1")
    await rows(db, "UPDATE devices SET status = 'retired' WHERE device_id = 'motor-4' RETURNING 1")
    before = await ask("health")
    assert "no: the gateway's pulse has never come" in before.out
    await hear(db)
    await heard(db, "motor-1")
    await heard(db, "motor-2", 20)
    await sweep(db)
    fleet = (await ask("health", "--json")).json
    assert [fleet[key] for key in ("devices", "online", "offline", "never_heard", "listening")] == [3, 1, 1, 1, True]
    assert [(site["name"], site["devices"], site["never_heard"]) for site in fleet["sites"]] == [
        ("berlin", 2, 0),
        ("paris", 1, 1),
    ]
    assert [(kind["name"], kind["offline"]) for kind in fleet["types"]] == [("motor", 1), ("pump", 0)]
    shown = await ask("health")
    assert "yes, without a gap since" in shown.out and "paris" in shown.out
    listed = (await ask("device", "list", "--offline", "--json")).json
    assert [device["device_id"] for device in listed["devices"]] == ["motor-2"]


async def test_a_device_is_shown_with_its_connectivity_and_what_it_measured(db: Database, ask: Any) -> None:
    await add_devices(db, 3)
    await hear(db)
    for minute in range(10):
        await save(
            db,
            heartbeat(float(minute), "motor-1", uptime=minute, cpu_temperature=40.0 + minute, error_count=minute % 2),
        )
        await rows(
            db,
            "UPDATE heartbeats SET at = now() - make_interval(mins => %s) WHERE device_time = to_timestamp(%s) RETURNING 1",
            600 - 60 * minute,
            float(minute),
        )
    await heard(db, "motor-2", 20)
    await sweep(db)
    health = (await ask("device", "health", "motor-1", "--since", "24h", "--json")).json
    assert (health["heartbeats"], health["boots"]) == (10, 1) and 3590 < health["longest_silence_seconds"] < 3610
    measured = {each["name"]: each for each in health["measurements"]}
    assert measured.keys() == {"cpuTemperature", "freeMemory", "networkSignalStrength", "errorCount", "volts"}
    hot = measured["cpuTemperature"]
    assert (hot["least"], hot["mean"], hot["most"], hot["newest"]) == (40.0, 44.5, 49.0, 49.0)
    assert hot["course"][:20] == [None] * 20 and next(value for value in hot["course"] if value is not None) == 40.0
    shown = (await ask("device", "health", "motor-1")).out
    assert "▁" in shown and "█" in shown and "44.5" in shown and "online (offline after 10m of silence)" in shown
    assert (await ask("device", "health", "motor-1", "--since", "90m", "--json")).json["heartbeats"] == 1
    silent = await ask("device", "show", "motor-2")
    assert "offline, found" in silent.out and "4.0 KiB" in silent.out and "20m" in silent.out
    as_json = (await ask("device", "show", "motor-2", "--json")).json
    assert as_json["offline_since"] and as_json["presence"]["cpu_temperature"] == 41.5
    assert "never heard" in (await ask("device", "show", "motor-3")).out
    assert (await ask("device", "health", "nobody")).status == 2


async def test_a_type_gets_a_limit_of_its_own_and_loses_it_again(db: Database, ask: Any) -> None:
    await add_devices(db, 2)
    said = await ask("device-type", "set", "motor", "--offline-after", "30m")
    assert "devices of type motor count as offline after 30m of silence" in said.out
    listed = (await ask("device-type", "list", "--json")).json
    assert listed == {"device_types": [{"device_type": "motor", "devices": 2, "offline_after_seconds": 1800.0}]}
    assert (await ask("device-type", "set", "motor", "--offline-after", "setting")).status == 0
    assert "10m (setting)" in (await ask("device-type", "list")).out
    for words in (
        ("pump", "--offline-after", "5m"),
        ("motor", "--offline-after", "soon"),
        ("motor", "--offline-after", "5s"),
    ):
        refused = await ask("device-type", "set", *words)
        assert refused.status == 2, refused.err
    audit = await rows(db, "SELECT action, reason FROM audit_events ORDER BY 2")
    assert audit == [
        ("device-type.changed", "offline after 1800 s"),
        ("device-type.changed", "offline as the setting says"),
    ]


def test_a_course_is_a_line_of_bars() -> None:
    assert sparkline([]) == "" and sparkline([None]) == ""
    assert sparkline([5, None, 5]) == "▁ ▁" and sparkline([0, 7, 3.5]) == "▁█▅"
