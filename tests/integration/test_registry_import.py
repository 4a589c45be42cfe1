"""Importing devices into a real PostgreSQL: all or nothing, counted exactly, nothing lost that the file is silent on."""

import asyncio
import json
from datetime import UTC, datetime

import pytest

from domain.device_rows import Format
from models.device import DeviceChanges, DeviceFilter, DeviceStatus
from models.errors import ImportRowError, InvalidInputError, NotFoundError
from models.views import ImportResult
from store.engine import Database
from store.registry import Registry

HEADER = "device_id,device_type,serial_number,site_id"


async def load(db: Database, text: str, form: Format = Format.CSV) -> ImportResult:
    """Import a file's text."""
    return await Registry(db).import_devices(text.encode().splitlines(keepends=True), "fleet.csv", form)


def fleet(count: int, header: str = HEADER, extra: str = "") -> str:
    """A CSV of motors m0, m1, ..."""
    return "".join([f"{header}\n", *(f"m{i},motor,S{i},berlin{extra}\n" for i in range(count))])


async def test_an_import_creates_then_updates_then_leaves_alone(db: Database) -> None:
    assert await load(db, fleet(50)) == ImportResult(rows=50, created=50, updated=0, unchanged=0)
    assert await load(db, fleet(50)) == ImportResult(rows=50, created=0, updated=0, unchanged=50)
    changed = fleet(60, HEADER + ",zone", ",hall 1").replace("hall 1", "", 20)
    assert await load(db, changed) == ImportResult(rows=60, created=10, updated=30, unchanged=20)


async def test_every_field_of_a_json_line_arrives(db: Database) -> None:
    wanted = {
        "device_id": "m1",
        "device_type": "motor",
        "serial_number": "S 1/ä",
        "manufacturer": "ACME \\ \t Söhne",
        "site_id": "berlin",
        "zone": "a\nb",
        "tags": {"environment": "production", "quote": "\"'\\"},
        "status": "retired",
        "firmware_version": "1.2.3",
        "firmware_sha256": "ab" * 32,
        "config": {"interval": 5, "nested": {"list": [1, None, True, "x"]}},
        "desired_config": {"interval": 6},
        "config_version": 7,
        "created_at": "2024-01-01T00:00:00Z",
        "retired_at": "2025-06-01T10:00:00+02:00",
        "last_heartbeat": "2025-05-01T00:00:00",
        "uptime": 123,
    }
    assert (await load(db, json.dumps(wanted), Format.JSON_LINES)).created == 1
    found = await Registry(db).get("m1")
    assert found.created_at == datetime(2024, 1, 1, tzinfo=UTC)
    assert found.retired_at == datetime(2025, 6, 1, 8, tzinfo=UTC)
    assert found.last_heartbeat == datetime(2025, 5, 1, tzinfo=UTC)
    same = set(wanted) - {"created_at", "retired_at", "last_heartbeat"}
    assert found.model_dump(mode="json", include=same) == {key: wanted[key] for key in same}


async def test_what_a_list_prints_can_be_imported_and_changes_nothing(db: Database) -> None:
    await load(db, fleet(3, HEADER + ",tags,status", ",line=3;due=2026-01-01,error"))
    page = await Registry(db).find(DeviceFilter())
    printed = "\n".join(device.model_dump_json() for device in page.devices)
    assert await load(db, printed, Format.JSON_LINES) == ImportResult(rows=3, created=0, updated=0, unchanged=3)


async def test_what_the_file_is_silent_on_stays_as_a_rollout_left_it(db: Database) -> None:
    await load(db, fleet(1, HEADER + ",firmware_version,tags.line", ",1.2.0,3"))
    await Registry(db).update("m0", DeviceChanges(firmware_version="1.3.0", desired_config={"a": 1}))
    assert (await load(db, fleet(1, HEADER + ",zone,firmware_version", ",hall 1,"))).updated == 1
    found = await Registry(db).get("m0")
    assert (found.zone, found.firmware_version, found.tags, found.desired_config) == (
        "hall 1",
        "1.3.0",
        {"line": "3"},
        {"a": 1},
    )
    await load(db, fleet(1, HEADER + ",firmware_version", ",1.2.9"))
    assert (await Registry(db).get("m0")).firmware_version == "1.2.9"


async def test_tags_of_a_file_replace_those_that_were_there(db: Database) -> None:
    await load(db, fleet(1, HEADER + ",tags", ",line=3;old=yes"))
    await load(db, fleet(1, HEADER + ",tags.line", ",4"))
    assert (await Registry(db).get("m0")).tags == {"line": "4"}


async def test_a_json_null_clears_and_a_missing_key_keeps(db: Database) -> None:
    device = {"device_id": "m1", "device_type": "motor", "serial_number": "S1", "site_id": "berlin"}
    await load(db, json.dumps({**device, "zone": "a", "manufacturer": "ACME"}), Format.JSON_LINES)
    await load(db, json.dumps({**device, "zone": None}), Format.JSON_LINES)
    found = await Registry(db).get("m1")
    assert (found.zone, found.manufacturer) == (None, "ACME")


async def test_retiring_and_reviving_by_import_keeps_the_date_in_step(db: Database) -> None:
    await load(db, fleet(1, HEADER + ",status", ",retired"))
    first = (await Registry(db).get("m0")).retired_at
    assert first is not None
    assert (await load(db, fleet(1, HEADER + ",status", ",retired"))).unchanged == 1
    assert (await Registry(db).get("m0")).retired_at == first
    await load(db, fleet(1, HEADER + ",status", ",active"))
    assert (await Registry(db).get("m0")).retired_at is None


async def test_one_bad_row_leaves_the_registry_untouched(db: Database) -> None:
    await load(db, fleet(5))
    bad = fleet(3000, HEADER + ",zone", ",new").replace("m2999,motor,S2999", "m2999,,S2999")
    with pytest.raises(ImportRowError, match=r"line 3001: device_type: is missing") as refused:
        await load(db, bad)
    assert refused.value.count == 1
    page = await Registry(db).find(DeviceFilter())
    assert page.total == 5
    assert {device.zone for device in page.devices} == {None}


async def test_the_first_twenty_bad_rows_are_listed_and_all_are_counted(db: Database) -> None:
    with pytest.raises(ImportRowError) as refused:
        await load(db, fleet(57).replace("motor", ""))
    assert (len(refused.value.mistakes), refused.value.count) == (20, 57)
    assert str(refused.value).splitlines()[0] == "cannot import fleet.csv: 57 mistakes; nothing was imported"
    assert str(refused.value).splitlines()[-1].strip() == "... and 37 more"


async def test_a_serial_number_of_another_device_in_the_registry_is_refused_with_its_line(db: Database) -> None:
    await load(db, fleet(5))
    with pytest.raises(ImportRowError, match=r"line 3: serial_number: 'S4' is the serial number of device m4"):
        await load(db, f"{HEADER}\nnew1,motor,N1,berlin\nnew2,motor,S4,berlin\n")
    with pytest.raises(NotFoundError):
        await Registry(db).get("new1")


async def test_the_name_of_the_file_is_in_the_error_about_its_header(db: Database) -> None:
    with pytest.raises(InvalidInputError, match=r"cannot import fleet\.csv: the header is wrong"):
        await load(db, "id;type\n")


async def test_a_heartbeat_in_the_file_never_replaces_a_later_one(db: Database) -> None:
    await load(db, fleet(1, HEADER + ",last_heartbeat,uptime", ",2026-02-01T00:00:00Z,5"))
    await load(db, fleet(1, HEADER + ",last_heartbeat,uptime", ",2026-01-01T00:00:00Z,1"))
    found = await Registry(db).get("m0")
    assert (found.last_heartbeat, found.uptime) == (datetime(2026, 2, 1, tzinfo=UTC), 5)


async def test_two_imports_of_the_same_fleet_at_once_both_end_well(db: Database) -> None:
    a, b = fleet(2000, HEADER + ",zone", ",a"), fleet(2000, HEADER + ",manufacturer", ",b")
    reversed_b = "\n".join([b.splitlines()[0], *reversed(b.splitlines()[1:])])
    results = await asyncio.gather(load(db, a), load(db, reversed_b))
    assert sum(result.created for result in results) == 2000
    page = await Registry(db).find(DeviceFilter(), limit=5000)
    assert len(page.devices) == 2000
    assert {device.status for device in page.devices} == {DeviceStatus.ACTIVE}


async def test_a_change_made_while_an_import_runs_is_not_lost(db: Database) -> None:
    """The gateway writes firmware_version of a device that the file only gives a zone."""
    await load(db, fleet(500, HEADER + ",firmware_version", ",1.2.0"))

    async def upgrade() -> None:
        async with db.pool.connection() as connection:
            await connection.execute("UPDATE devices SET firmware_version = '1.3.0' WHERE device_id LIKE 'm%7'")
            await asyncio.sleep(0.3)

    await asyncio.gather(upgrade(), load(db, fleet(500, HEADER + ",zone", ",a")))
    page = await Registry(db).find(DeviceFilter(versions=("1.3.0",)), limit=500)
    assert page.total == 50
    assert {device.zone for device in page.devices} == {"a"}


async def test_a_configuration_that_an_import_or_an_update_wants_gets_a_version_of_its_own(db: Database) -> None:
    registry = Registry(db)

    async def version_after(desired: dict[str, int] | None, zone: str = "a") -> tuple[int, str | None]:
        device = {"device_id": "m0", "device_type": "motor", "serial_number": "S0", "site_id": "berlin", "zone": zone}
        line = json.dumps(device | ({} if desired is None else {"desired_config": desired, "config_version": 3}))
        await registry.import_devices([line.encode() + b"\n"], "fleet.jsonl", Format.JSON_LINES)
        found = await registry.get("m0")
        return found.desired_config_version, found.config_state

    assert await version_after(None) == (0, "none")
    assert await version_after({"interval": 6}) == (4, "pending")
    assert await version_after({"interval": 6}, "b") == (4, "pending")
    assert await version_after(None, "c") == (4, "pending")
    assert await version_after({"interval": 7}) == (5, "pending")
    changed = await registry.update("m0", DeviceChanges(desired_config={"interval": 8}))
    assert changed.desired_config_version == 6
    assert (await registry.update("m0", DeviceChanges(zone="d"))).desired_config_version == 6
    made = await registry.create(changed.model_copy(update={"device_id": "m1", "serial_number": "S1"}))
    assert (made.desired_config_version, made.config_state) == (4, "pending")
