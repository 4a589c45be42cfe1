"""`audit`, `alert` and `device lookup` against a real PostgreSQL, as a person types them."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis.asyncio import Redis

from activities.cache import CacheRelay
from cli.audit import pattern_of, since_of
from models.errors import InvalidInputError
from store.alerts import raise_alert
from store.audit import append_audit
from store.device_cache import FRESH
from tests.cli_runner import Ran, run
from tests.conftest import RedisServer

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


class Desk:
    """A person's desk: what is in the database, and the command line."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.environment = {
            "TIDEGATE_DATABASE_URL": url,
            "TIDEGATE_STATE_DIR": str(folder),
            "TIDEGATE_ACTOR": "anna",
            "TIDEGATE_REDIS_URL": "",
        }

    def run(self, *words: object, **more: str) -> Ran:
        """Run a command."""
        return run(*words, **{**self.environment, **more})

    def sql(self, statement: str, *arguments: object) -> None:
        """Run a statement."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement.encode(), arguments)

    def write(self, work: Callable[[psycopg.AsyncConnection], Any]) -> None:
        """Do something over a connection, and commit."""

        async def main() -> None:
            async with await psycopg.AsyncConnection.connect(self.url) as connection:
                await work(connection)

        asyncio.run(main())

    def audit(self, *options: object) -> list[str]:
        """The actions that `audit` shows, the newest first."""
        return [event["action"] for event in self.run("audit", *options, "--json").json["events"]]


@pytest.fixture
def desk(empty_database: str, tmp_path: Path) -> Desk:
    made = Desk(empty_database, tmp_path)
    made.sql(
        "INSERT INTO devices (device_id, device_type, serial_number, site_id, tags, status, config, config_version) "
        "VALUES ('motor-7', 'motor', 'SN-7', 'berlin', '{}', 'active', '{}', 0)"
    )
    return made


@pytest.fixture
def audited(desk: Desk) -> Desk:
    async def write(connection: psycopg.AsyncConnection) -> None:
        await append_audit(connection, "bob", "batch.created", "batch", "spring")
        await append_audit(connection, "enrolment", "enrolment.requested", "serial", "SN-7")
        await append_audit(connection, "worker", "certificate.issued", "device", "motor-7", "", {"generation": 1})
        await append_audit(connection, "worker", "certificate.issued", "device", "motor-8")
        await append_audit(connection, "anna", "certificate.revoked", "device", "motor-7", "stolen \x1b[2J")
        await append_audit(connection, "anna", "certificatexrevoked", "device", "motor-9")

    desk.write(write)
    return desk


def test_the_audit_is_shown_the_newest_line_first_and_nothing_of_it_reaches_the_terminal_raw(audited: Desk) -> None:
    ran = audited.run("audit")
    assert ran.err.strip() == "6 lines"
    assert ran.out.index("certificatexrevoked") < ran.out.index("batch.created")
    assert "stolen \\x1b[2J" in ran.out
    assert "\x1b[2J" not in ran.out
    assert "generation=1" in ran.out


def test_the_audit_is_narrowed_by_what_it_is_about_who_did_it_and_what(audited: Desk) -> None:
    assert audited.audit("--serial", "SN-7") == ["enrolment.requested"]
    assert audited.audit("--batch", "spring") == ["batch.created"]
    assert audited.audit("--actor", "bob") == ["batch.created"]
    assert audited.audit("--action", "certificate.revoked") == ["certificate.revoked"]
    assert audited.audit("--action", "certificate.*", "--device", "motor-8") == ["certificate.issued"]
    assert audited.audit("--action", "%") == []
    assert audited.audit("--device", "' OR 1=1 --") == []
    assert audited.audit("--limit", 2) == ["certificatexrevoked", "certificate.revoked"]
    assert "--limit shows more than 2" in audited.run("audit", "--limit", 2).err


def test_the_audit_of_a_device_has_what_was_done_to_the_serial_numbers_it_has_borne(audited: Desk) -> None:
    life = ["certificate.revoked", "certificate.issued", "enrolment.requested"]
    assert audited.audit("--device", "motor-7") == life
    audited.sql("DELETE FROM devices")
    assert audited.audit("--device", "motor-7") == life[:2]
    audited.sql(
        "INSERT INTO tombstones (serial_number, device_id, retired_by, reason) VALUES ('SN-7', 'motor-7', 'anna', '')"
    )
    assert audited.audit("--device", "motor-7") == life


def test_the_audit_since_a_time_leaves_out_what_was_before(audited: Desk) -> None:
    assert len(audited.audit("--since", "2h")) == 6
    assert audited.audit("--since", "2999-01-01") == []
    assert len(audited.audit("--since", "2020-01-01T00:00+02:00")) == 6
    ran = audited.run("audit", "--since", "yesterday")
    assert ran.status == 2
    assert "expected how long ago, as 2h or 7d" in ran.err


def test_the_audit_is_about_one_thing_at_a_time(audited: Desk) -> None:
    ran = audited.run("audit", "--device", "motor-7", "--serial", "SN-7")
    assert ran.status == 2
    assert "at most one of --device, --serial and --batch" in ran.err


@pytest.mark.parametrize(
    ("written", "moment"),
    [
        ("2h", "2026-11-24T10:00:00+00:00"),
        ("1d12h", "2026-11-23T00:00:00+00:00"),
        ("2026-11-01", "2026-11-01T00:00:00+00:00"),
        ("2026-11-24T18:30Z", "2026-11-24T18:30:00+00:00"),
    ],
)
def test_since_is_a_duration_or_a_date(written: str, moment: str) -> None:
    assert since_of(written, NOW).isoformat() == moment


@pytest.mark.parametrize("written", ["", "soon", "-2h", "99999999999d", "2026-13-01"])
def test_what_is_no_time_is_refused(written: str) -> None:
    with pytest.raises(InvalidInputError, match="not a time"):
        since_of(written, NOW)


def test_only_the_star_stands_for_anything() -> None:
    assert pattern_of(r"a*_%\*") == r"a%\_\%\\%"


def test_alerts_are_listed_taken_and_resolved(desk: Desk) -> None:
    async def write(connection: psycopg.AsyncConnection) -> None:
        for _ in range(3):
            await raise_alert(connection, "cloned-device", "motor-7", "two boot ids took turns")
        await raise_alert(connection, "claim-rate", "spring", "70 requests in 60 s")

    desk.write(write)
    listed = desk.run("alert", "list", "--json").json["alerts"]
    assert [(a["rule"], a["state"], a["occurrences"]) for a in listed] == [
        ("claim-rate", "open", 1), ("cloned-device", "open", 3),
    ]  # fmt: skip
    first, second = listed[1]["alert_no"], listed[0]["alert_no"]
    assert desk.run("alert", "acknowledge", first).out.strip() == f"acknowledged: {first}"
    shown = desk.run("alert", "list")
    assert "acknowledged" in shown.out
    assert "anna" in shown.out
    assert shown.err.strip() == "2 alerts"
    assert desk.run("alert", "resolve", first, second, "--json").json == {"resolved": [first, second]}
    assert desk.run("alert", "list").err.strip() == "0 alerts"
    resolved = desk.run("alert", "list", "--all", "--json").json["alerts"]
    assert {(a["state"], a["resolved_by"]) for a in resolved} == {("resolved", "anna")}
    desk.write(lambda connection: raise_alert(connection, "cloned-device", "motor-7", "again"))
    again = desk.run("alert", "list", "--json").json["alerts"]
    assert [(a["occurrences"], a["alert_no"] not in (first, second)) for a in again] == [(1, True)]


def test_an_alert_that_does_not_stand_is_no_alert(desk: Desk) -> None:
    ran = desk.run("alert", "resolve", 77)
    assert ran.status == 2
    assert "no alert 77 stands, nothing was changed; 'alert list' shows those that do" in ran.err


def test_a_device_is_looked_up_without_redis(desk: Desk) -> None:
    found = desk.run("device", "lookup", "motor-7", "--json").json
    assert (found["device"]["serial_number"], found["source"]) == ("SN-7", "postgresql")
    assert found["why"] == "no Redis is given"
    assert "last_heartbeat" not in found["device"]
    shown = desk.run("device", "lookup", "--serial", "SN-7")
    assert "motor-7" in shown.out
    assert "postgresql: no Redis is given" in shown.out


def test_a_lookup_says_what_it_wants_and_what_there_is_not(desk: Desk) -> None:
    for words in ((), ("motor-7", "--serial", "SN-7")):
        ran = desk.run("device", "lookup", *words)
        assert ran.status == 2
        assert "expected either a device id or --serial" in ran.err
    ran = desk.run("device", "lookup", "nobody")
    assert (ran.status, ran.out) == (2, "")
    assert "no device with the id 'nobody'" in ran.err
    ran = desk.run("device", "lookup", "motor-7", TIDEGATE_REDIS_URL="localhost")
    assert ran.status == 2
    assert "expected redis://host:port/0" in ran.err


async def test_a_device_is_looked_up_in_redis_where_a_worker_keeps_it_right(
    desk: Desk, redis_server: RedisServer
) -> None:
    async def look() -> Any:
        words = ("device", "lookup", "motor-7", "--json")
        return (await asyncio.to_thread(desk.run, *words, TIDEGATE_REDIS_URL=redis_server.url)).json

    assert "nobody vouches" in (await look())["why"]
    stop = asyncio.Event()
    relay = asyncio.create_task(CacheRelay(desk.url, redis_server.url).run(stop))
    redis = Redis.from_url(redis_server.url)
    async with asyncio.timeout(10):
        while not await redis.exists(FRESH):
            await asyncio.sleep(0.05)
        while (found := await look())["source"] != "redis":
            await asyncio.sleep(0.1)
    assert found["why"] == "kept"
    assert found["device"]["site_id"] == "berlin"
    stop.set()
    await relay
    await redis.aclose()
    redis_server.kill()
    found = await look()
    assert (found["source"], found["device"]["site_id"]) == ("postgresql", "berlin")
    assert "ConnectionError" in found["why"]
