"""`device` and `release` against a real PostgreSQL and a real artifact folder, as a person types them."""

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from firmware.keys import generate_private_key, save_private_key
from tests.cli_runner import Ran, run

HEADER = "device_id,device_type,serial_number,site_id"
IMAGE = bytes(range(256)) * 8


class Desk:
    """A person's desk: a state directory, files, and the command line."""

    def __init__(self, folder: Path, database_url: str) -> None:
        self.folder = folder
        self.environment = {
            "TIDEGATE_DATABASE_URL": database_url,
            "TIDEGATE_ARTIFACT_STORE": (folder / "store").as_uri(),
            "TIDEGATE_STATE_DIR": str(folder / "state"),
            "TIDEGATE_ACTOR": "anna",
        }

    def run(self, *words: object, stdin: bytes | None = None) -> Ran:
        """Run a command."""
        return run(*words, stdin=stdin, **self.environment)

    def file(self, name: str, content: str | bytes) -> Path:
        """Write a file."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def publish(self, image: Path, *options: object, version: str = "1.3.0") -> Ran:
        """Publish an image of motor-controller with the desk's key."""
        key = self.folder / "release.key"
        if not key.exists():
            save_private_key(key, generate_private_key())
        words = ("--product", "motor-controller", "--hardware", "motor", "--version", version, "--key", key)
        return self.run("release", "publish", image, *words, *options)


@pytest.fixture
def desk(tmp_path: Path, empty_database: str) -> Desk:
    return Desk(tmp_path, empty_database)


def test_a_fleet_is_imported_listed_and_shown(desk: Desk) -> None:
    rows = "".join(f"m{i},motor,S{i},berlin,2026-0{i}-12\n" for i in range(1, 6))
    fleet = desk.file("fleet.csv", f"{HEADER},tags.maintenance-due\n{rows}p1,pump,SP,paris,\n")
    assert desk.run("device", "import", fleet).out.strip() == "6 devices: 6 created, 0 updated, 0 unchanged"
    assert desk.run("device", "import", fleet, "--json").json == {"rows": 6, "created": 0, "updated": 0, "unchanged": 6}
    due = desk.run("device", "list", "--type", "motor", "--tag", "maintenance-due < 2026-03-12", "--json").json
    assert (due["total"], [device["device_id"] for device in due["devices"]]) == (2, ["m1", "m2"])
    listed = desk.run("device", "list", "--limit", "2")
    assert "m2" in listed.out
    assert "2 of 6 devices; the next begin with --after m2" in listed.err
    assert [d["device_id"] for d in desk.run("device", "list", "--after", "m4", "--json").json["devices"]] == [
        "m5",
        "p1",
    ]
    assert desk.run("device", "show", "--serial", "SP", "--json").json["device_id"] == "p1"
    assert "maintenance-due" in desk.run("device", "show", "m1").out
    missing = desk.run("device", "show", "m9", "--json")
    assert (missing.status, missing.json["error"]["kind"]) == (2, "NotFoundError")


def test_standard_input_is_imported_and_its_format_found_out(desk: Desk) -> None:
    line = json.dumps({"device_id": "m1", "device_type": "motor", "serial_number": "S1", "site_id": "berlin"})
    assert desk.run("device", "import", "-", stdin=line.encode()).status == 0
    assert desk.run("device", "import", "-", stdin=f"{HEADER}\nm2,motor,S2,berlin\n".encode()).status == 0
    assert desk.run("device", "list", "--limit", "0", "--json").json == {"total": 2, "devices": []}


def test_bad_rows_are_listed_with_their_lines_and_nothing_is_imported(desk: Desk) -> None:
    rows = "".join(f"m{i},,S{i},berlin\n" for i in range(30))
    ran = desk.run("device", "import", desk.file("fleet.csv", f"{HEADER}\ngood,motor,G,berlin\n{rows}"), "--json")
    assert ran.status == 2
    assert "30 mistakes; nothing was imported" in ran.err
    assert "... and 10 more" in ran.err
    assert ran.json["error"]["mistakes"][0] == {"line": 3, "path": "device_type", "message": "is missing"}
    assert desk.run("device", "list", "--json").json["total"] == 0


def test_a_line_without_end_is_never_held(desk: Desk) -> None:
    """64 MiB without a line end: the row is refused, the next one is read."""
    fleet = desk.file("fleet.csv", HEADER.encode() + b"\nm1,motor,S1," + b"x" * (64 << 20) + b"\nm2,,S2,berlin\n")
    ran = desk.run("device", "import", fleet)
    assert ran.status == 2
    assert "line 2: (line): the line is longer than 262144 bytes" in ran.err
    assert "line 3: device_type: is missing" in ran.err


def test_a_release_is_signed_stored_by_content_and_listed(desk: Desk) -> None:
    image = desk.file("image.bin", IMAGE)
    published = desk.publish(image, "--json")
    sha256 = hashlib.sha256(IMAGE).hexdigest()
    assert published.status == 0
    release = published.json["release"]
    assert (release["ref"], release["sha256"], release["published_by"]) == ("motor-controller@1.3.0", sha256, "anna")
    assert (desk.folder / "store" / "artifacts" / sha256).read_bytes() == IMAGE
    listed = desk.run("release", "list", "--json").json["releases"]
    assert [entry["ref"] for entry in listed] == ["motor-controller@1.3.0"]
    assert sha256 in desk.run("release", "show", "motor-controller@1.3.0").out


def test_the_private_key_goes_nowhere(desk: Desk) -> None:
    """Neither into the store, nor the database, nor a message: only its public half is named."""
    ran = desk.publish(desk.file("image.bin", IMAGE), "--json")
    pem = (desk.folder / "release.key").read_bytes()
    secret = base64.b64decode(pem.splitlines()[1])[-32:]
    everything = [path.read_bytes() for path in desk.folder.rglob("*") if path.is_file() and path.name != "release.key"]
    texts = (ran.out + ran.err).encode() + b"".join(everything)
    for written in (secret, secret.hex().encode(), base64.b64encode(secret), pem.splitlines()[1]):
        assert written not in texts
    assert ran.json["release"]["key_id"] in ran.out


def test_the_same_image_again_changes_nothing(desk: Desk) -> None:
    image = desk.file("image.bin", IMAGE)
    first = desk.publish(image, "--expires", "90d", "--json").json
    again = desk.publish(image, "--expires", "90d", "--json")
    assert (again.status, again.json["created"], again.json["release"]) == (0, False, first["release"])
    assert "published already; nothing changed" in again.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--hardware", "pump"), "hardware is"),
        (("--security-counter", "2"), "security_counter is 1, not 2"),
        (("--expires", "2099-01-01"), "expires_at is nothing, not"),
    ],
)
def test_another_statement_under_a_published_version_is_refused(
    desk: Desk, options: tuple[str, ...], named: str
) -> None:
    image = desk.file("image.bin", IMAGE)
    assert desk.publish(image).status == 0
    ran = desk.publish(image, *options)
    assert ran.status == 6
    assert named in ran.err


def test_other_bytes_under_a_published_version_are_refused_and_not_stored(desk: Desk) -> None:
    assert desk.publish(desk.file("image.bin", IMAGE)).status == 0
    ran = desk.publish(desk.file("other.bin", IMAGE[:-1]))
    assert ran.status == 6
    assert "a published version never changes" in ran.err
    assert "Publish under another version" in ran.err
    assert [path.name for path in (desk.folder / "store" / "artifacts").iterdir()] == [
        hashlib.sha256(IMAGE).hexdigest()
    ]


def test_the_security_counter_of_a_product_never_falls_unasked(desk: Desk) -> None:
    counters = []
    for version, options in (("1.0", ()), ("1.1", ("--security-counter", "3")), ("1.2", ()), ("1.0", ())):
        ran = desk.publish(desk.file(f"{version}.bin", version), *options, "--json", version=version)
        counters.append(ran.json["release"]["security_counter"])
    assert counters == [1, 3, 3, 1]


def test_a_signature_is_checked_as_a_device_would(desk: Desk) -> None:
    assert desk.run("release", "keygen", "--out", desk.folder / "release").status == 0
    assert desk.run("release", "keygen", "--out", desk.folder / "other").status == 0
    assert desk.publish(desk.file("image.bin", IMAGE)).status == 0
    good = desk.run("release", "show", "motor-controller@1.3.0", "--key", desk.folder / "release.pub")
    bad = desk.run("release", "show", "motor-controller@1.3.0", "--key", desk.folder / "other.pub")
    assert (good.status, bad.status) == (0, 1)
    assert "the signature holds" in good.err


@pytest.mark.parametrize(
    ("expires", "seconds"),
    [("90d", 90 * 86400), ("2099-01-31", None), ("2099-01-31T12:00:00+01:00", None)],
)
def test_an_expiry_is_a_time_from_now_or_a_date(desk: Desk, expires: str, seconds: int | None) -> None:
    envelope = desk.publish(desk.file("image.bin", IMAGE), "--expires", expires, "--json").json["release"]["envelope"]
    statement: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    if seconds is not None:
        assert abs(statement["expires_at"] - statement["published_at"] - seconds) <= 1
    else:
        assert datetime.fromtimestamp(statement["expires_at"], UTC).strftime("%Y-%m-%d") == "2099-01-31"


@pytest.mark.parametrize("expires", ["yesterday", "2020-01-01", "0s", "90", "99999999999d"])
def test_an_expiry_that_is_none_is_refused(desk: Desk, expires: str) -> None:
    ran = desk.publish(desk.file("image.bin", IMAGE), "--expires", expires)
    assert ran.status == 2
    assert "--expires" in ran.err


def test_an_image_that_is_none_is_refused(desk: Desk) -> None:
    for image, words in ((desk.file("empty.bin", b""), "the file is empty"), (desk.folder, "cannot publish")):
        ran = desk.publish(image)
        assert ran.status == 2
        assert words in ran.err


def test_a_key_that_others_can_read_is_pointed_out(desk: Desk) -> None:
    image = desk.file("image.bin", IMAGE)
    assert "can be read by others" not in desk.publish(image).err
    (desk.folder / "release.key").chmod(0o644)
    assert "can be read by others; chmod 600" in desk.publish(image).err


def test_an_old_device_is_shown_as_inactive(desk: Desk) -> None:
    now = datetime.now(UTC)
    rows = [("m1", now - timedelta(hours=2)), ("m2", now), ("m3", "")]
    lines = "".join(f"{name},motor,S{name},berlin,{heartbeat}\n" for name, heartbeat in rows)
    desk.run("device", "import", desk.file("fleet.csv", f"{HEADER},last_heartbeat\n{lines}"))
    found = desk.run("device", "list", "--inactive", "1h", "--json").json
    assert [device["device_id"] for device in found["devices"]] == ["m1", "m3"]
    assert "2h ago" in desk.run("device", "list").out


def test_a_database_without_schema_says_how_to_get_one(desk: Desk) -> None:
    with psycopg.connect(desk.environment["TIDEGATE_DATABASE_URL"], autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS bare")
        connection.execute("CREATE DATABASE bare")
    bare = psycopg.conninfo.conninfo_to_dict(desk.environment["TIDEGATE_DATABASE_URL"])
    desk.environment["TIDEGATE_DATABASE_URL"] = (
        f"postgresql://{bare['user']}:{bare.get('password', '')}@{bare['host']}:{bare.get('port', 5432)}/bare"
        if not str(bare["host"]).startswith("/")
        else f"postgresql://{bare['user']}@/bare?host={bare['host']}"
    )
    ran = desk.run("device", "list")
    assert ran.status == 1
    assert "'starter.py migrate' brings it there" in ran.err
    assert desk.run("migrate").status == 0
    assert desk.run("device", "list", "--json").json["total"] == 0
