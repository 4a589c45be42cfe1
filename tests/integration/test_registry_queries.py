"""Devices one by one and by filter, against a real PostgreSQL; the filter's pure function is the oracle."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from domain.device_rows import Format
from domain.selector import matches
from models.device import DeviceChanges, DeviceFilter, DeviceRecord, DeviceStatus
from models.errors import ConflictError, InvalidInputError, NotFoundError
from store.engine import Database
from store.filters import where
from store.registry import Registry

NOW = datetime.now(UTC)
INJECTIONS = [
    "' OR '1'='1",
    "' OR 1=1 --",
    "'; DROP TABLE devices; --",
    "x'); DELETE FROM devices WHERE ('1'='1",
    "' UNION SELECT device_id FROM devices --",
    "\\' OR 1=1 --",
    '" OR ""="',
    "$$; SELECT pg_sleep(5); $$",
    "%(filter_type)s",
    "%s",
    "%",
    "%%",
    ":name",
    "{filter_type}",
    "{0.__class__}",
    "?",
    "$1",
    "' || pg_sleep(5) || '",
    "1; SELECT pg_sleep(5)",
    "/* */",
    "--",
    "\\",
    "''",
    "' ; COMMIT; DROP TABLE devices",
    "true) OR (true",
    '{"a": "b"}',
    "jsonb '{}' ",
    "\u2019 OR 1=1",
    "\uff07 OR 1=1",
    "a\nb",
    "a\u2028b",
    "\U0001f4a3",
    "\ufeff",
    "null",
    "<' OR '1'='1",
    ">='; DROP TABLE devices; --",
    "!=' OR true --",
]


def device(device_id: str, **changes: object) -> DeviceRecord:
    """A motor in Berlin, with changes."""
    return DeviceRecord.model_validate(
        {"device_id": device_id, "device_type": "motor", "serial_number": f"S-{device_id}", "site_id": "berlin"}
        | changes
    )


async def add(db: Database, *devices: DeviceRecord) -> None:
    """Put devices into the registry by way of an import."""
    lines = [json.dumps(d.model_dump(mode="json", exclude_none=True)).encode() + b"\n" for d in devices]
    await Registry(db).import_devices(lines, "test", Format.JSON_LINES)


async def selected(db: Database, devices: DeviceFilter) -> set[str]:
    """Ids that the database selects."""
    page = await Registry(db).find(devices, limit=1000)
    assert page.total == len(page.devices)
    return {found.device_id for found in page.devices}


# --- the filter ------------------------------------------------------------------------------------------------------

FLEET = [
    device("m1", tags={"environment": "production", "maintenance-due": "2026-03-11"}, firmware_version="1.2.0"),
    device("m2", tags={"environment": "production", "maintenance-due": "2026-03-12"}, firmware_version="1.3.0"),
    device("m3", tags={"environment": "test"}, site_id="paris", last_heartbeat=NOW),
    device("m4", tags={}, status="error", last_heartbeat=NOW - timedelta(minutes=30)),
    device("p1", device_type="pump", tags={"environment": "Production"}),
    device("old", status="retired", tags={"environment": "production"}),
]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, "m1 m2 m3 m4 p1"),
        ({"type": "motor"}, "m1 m2 m3 m4"),
        ({"sites": ["paris"]}, "m3"),
        ({"tags": {"environment": "production"}}, "m1 m2"),
        ({"tags": {"environment": "!=production"}}, "m3 p1"),
        ({"tags": {"environment": "<a"}}, "p1"),
        ({"tags": {"maintenance-due": "<2026-03-12"}}, "m1"),
        ({"tags": {"maintenance-due": "<= 2026-03-12", "environment": "production"}}, "m1 m2"),
        ({"tags": {"maintenance-due": ">2026-03-11"}}, "m2"),
        ({"statuses": ["error", "retired"]}, "m4 old"),
        ({"versions": ["1.2.0", "9"]}, "m1"),
        ({"ids": ["m1", "old", "nobody"]}, "m1"),
        ({"inactive_minutes": 10}, "m1 m2 m4 p1"),
        ({"inactive_minutes": 60}, "m1 m2 p1"),
        ({"inactive_minutes": 10, "type": "motor", "statuses": ["error"]}, "m4"),
    ],
)
async def test_a_filter_selects_what_it_says(db: Database, query: dict[str, object], expected: str) -> None:
    # The suite may run for longer than the minutes that these filters are about: heartbeats are moved to now.
    now = datetime.now(UTC)
    fleet = [
        d.model_copy(update={"last_heartbeat": d.last_heartbeat and d.last_heartbeat + (now - NOW)}) for d in FLEET
    ]
    await add(db, *fleet)
    devices = DeviceFilter.model_validate(query)
    assert await selected(db, devices) == set(expected.split())
    assert {d.device_id for d in fleet if matches(devices, d, now)} == set(expected.split())


_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
_WORDS = st.sampled_from(["", "a", "B", "b", "ä", "z", "10", "9", "<", "=", " a", "A b", *INJECTIONS])
_VALUES = _TEXT | _WORDS
_CONDITIONS = st.builds(
    lambda operator, value: operator + value, st.sampled_from(["", "<", "<=", ">", ">=", "!=", "< ", "="]), _VALUES
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tags=st.lists(st.dictionaries(_VALUES, _VALUES, max_size=3), min_size=1, max_size=6),
    conditions=st.dictionaries(_VALUES, _CONDITIONS, max_size=2),
    data=st.data(),
)
async def test_the_database_and_the_pure_function_select_the_same_devices_for_any_text(
    db: Database, tags: list[dict[str, str]], conditions: dict[str, str], data: st.DataObject
) -> None:
    known = sorted({(key, value) for each in tags for key, value in each.items()})
    if known:
        key, value = data.draw(st.sampled_from(known), label="a tag that some device has")
        conditions |= {key: data.draw(st.sampled_from(["", "<", "<=", ">", ">=", "!="])) + value}
    async with db.pool.connection() as connection:
        await connection.execute("DELETE FROM devices")
    fleet = [device(f"m{i}", tags=each) for i, each in enumerate(tags)]
    await add(db, *fleet)
    devices = DeviceFilter(tags=conditions)
    assert await selected(db, devices) == {d.device_id for d in fleet if matches(devices, d, NOW)}


# --- hostile text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", INJECTIONS)
async def test_no_text_of_a_filter_becomes_sql(db: Database, text: str) -> None:
    fleet = [device("m1"), device("m2", tags={"environment": text}), device("m3", tags={text: "production"})]
    await add(db, *fleet)
    by_value = DeviceFilter(tags={"environment": text})
    assert await selected(db, by_value) == {d.device_id for d in fleet if matches(by_value, d, NOW)}
    for hostile, ordinary in (
        ({"tags": {text: "production"}}, {"tags": {"a": "b"}}),
        ({"tags": {text: f"<{text}"}}, {"tags": {"a": "<b"}}),
        ({"type": text}, {"type": "a"}),
        ({"sites": [text, text]}, {"sites": ["a"]}),
        ({"versions": [text]}, {"versions": ["a"]}),
    ):
        devices = DeviceFilter.model_validate(hostile)
        assert await selected(db, devices) == {d.device_id for d in fleet if matches(devices, d, NOW)}
        assert where(devices)[0] == where(DeviceFilter.model_validate(ordinary))[0]
    assert await selected(db, DeviceFilter()) == {"m1", "m2", "m3"}


async def test_without_bound_parameters_the_same_text_would_take_the_whole_fleet(db: Database) -> None:
    """The mutant: a clause made by putting text together is broken by the first line of the corpus."""
    await add(db, device("m1"), device("m2"))
    clause = f"d.tags ->> 'environment' = '{INJECTIONS[0]}'"
    async with db.pool.connection() as connection:
        rows = await (await connection.execute(f"SELECT FROM devices d WHERE {clause}".encode())).fetchall()
    assert len(rows) == 2
    assert await selected(db, DeviceFilter(tags={"environment": INJECTIONS[0]})) == set()


async def test_changing_devices_with_hostile_text_changes_those_devices_to_that_text(db: Database) -> None:
    await add(db, device("m1", tags={"line": "3"}), device("m2"))
    for text in INJECTIONS:
        changes = DeviceChanges(zone=text, tags={"line": "3", text: text}, config={text: text})
        assert await Registry(db).update_many(DeviceFilter(tags={"line": "3"}), changes) == 1
        found = await Registry(db).get("m1")
        assert (found.zone, found.tags[text], found.config) == (text, text, {text: text})
    assert (await Registry(db).get("m2")).zone is None


async def test_text_is_compared_by_code_point_whatever_the_servers_locale(db: Database) -> None:
    """Under a language's rules `a < B`. This server may know no language, so the clause itself is looked at too."""
    await add(db, device("m1", tags={"x": "a"}), device("m2", tags={"x": "C"}))
    assert await selected(db, DeviceFilter(tags={"x": "<B"})) == set()
    assert 'COLLATE "C" <' in where(DeviceFilter(tags={"x": "<B"}))[0]


# --- one device ------------------------------------------------------------------------------------------------------


async def test_a_device_is_created_found_changed_and_retired(db: Database) -> None:
    registry = Registry(db)
    created = await registry.create(device("m1", zone="a", tags={"line": "3"}))
    assert await registry.get("m1") == created == await registry.get_by_serial("S-m1")
    assert created.created_at is not None
    changed = await registry.update("m1", DeviceChanges(zone=None, firmware_version="1.3.0"))
    assert (changed.zone, changed.firmware_version, changed.tags) == (None, "1.3.0", {"line": "3"})
    retired = await registry.retire("m1")
    assert retired.status is DeviceStatus.RETIRED
    assert retired.retired_at is not None
    assert await registry.retire("m1") == retired
    assert await registry.count(DeviceFilter()) == 0


@pytest.mark.parametrize("other", [device("m1", serial_number="other"), device("m2", serial_number="S-m1")])
async def test_an_id_and_a_serial_number_belong_to_one_device(db: Database, other: DeviceRecord) -> None:
    await Registry(db).create(device("m1"))
    with pytest.raises(ConflictError, match=r"another device has this (id|serial number)"):
        await Registry(db).create(other)


@pytest.mark.parametrize("missing", ["nobody", "", "'; DROP TABLE devices; --", "\0"])
async def test_a_device_that_is_not_there_is_named(db: Database, missing: str) -> None:
    registry = Registry(db)
    with pytest.raises(NotFoundError, match="no device with the id"):
        await registry.get(missing)
    with pytest.raises(NotFoundError, match="no device with the serial number"):
        await registry.get_by_serial(missing)
    if missing != "\0":
        with pytest.raises(NotFoundError):
            await registry.update(missing, DeviceChanges(zone="a"))


@pytest.mark.parametrize("changes", [DeviceChanges(zone="a\0"), DeviceChanges(config={"a": "\0"})])
async def test_text_that_postgresql_cannot_hold_is_refused_and_changes_nothing(
    db: Database, changes: DeviceChanges
) -> None:
    before = await Registry(db).create(device("m1"))
    with pytest.raises(InvalidInputError, match="cannot change devices"):
        await Registry(db).update("m1", changes)
    assert await Registry(db).get("m1") == before


async def test_only_devices_that_really_change_are_counted_and_dated(db: Database) -> None:
    await add(db, device("m1", zone="a"), device("m2", zone="b"))
    before = await Registry(db).get("m1")
    assert await Registry(db).update_many(DeviceFilter(), DeviceChanges(zone="a")) == 1
    assert await Registry(db).get("m1") == before
    assert await Registry(db).update_many(DeviceFilter(), DeviceChanges()) == 0


async def test_a_page_says_how_many_there_are_and_the_next_begins_behind_it(db: Database) -> None:
    await add(db, *(device(f"m{i:02}") for i in range(10)))
    first = await Registry(db).find(DeviceFilter(type="motor"), limit=4)
    second = await Registry(db).find(DeviceFilter(type="motor"), limit=4, after=first.devices[-1].device_id)
    assert [d.device_id for d in (*first.devices, *second.devices)] == [f"m{i:02}" for i in range(8)]
    assert first.total == second.total == 10


async def test_the_whole_fleet_can_be_walked_through(db: Database) -> None:
    await add(db, *(device(f"m{i:04}") for i in range(2500)))
    walked = [d.device_id async for d in Registry(db).iterate(DeviceFilter(type="motor"))]
    assert walked == [f"m{i:04}" for i in range(2500)]


async def test_exact_tags_are_found_through_their_index(db: Database) -> None:
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status, tags) "
            "SELECT 'm' || i, 'motor', 'S' || i, 'berlin', 'active', jsonb_build_object('line', (i % 1000)::text) "
            "FROM generate_series(1, 20000) i"
        )
        await connection.execute("ANALYZE devices")
        clause, params = where(DeviceFilter(tags={"line": "7"}))
        rows = await (
            await connection.execute(f"EXPLAIN SELECT FROM devices d WHERE {clause}".encode(), params)
        ).fetchall()
    assert "devices_tags" in "\n".join(row[0] for row in rows)
    assert params["filter_tags"].obj == Jsonb({"line": "7"}).obj
