"""The commands for claim batches and enrolments, and `device enroll`, against a real server."""

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from temporalio.client import Client

from cli.enroll import enroll
from models.errors import InvalidInputError, NotFoundError, RefusedError
from store.engine import Database
from tests.cli_runner import Ran, run
from tests.integration.enrolment_setup import CONFIRM, PASSPHRASE, Door, Pki, column, value
from tests.integration.test_enrolment_server import until


@pytest_asyncio.fixture
async def starter(door: Door, db: Database, temporal: Client, pki: Pki, tmp_path: Path) -> AsyncIterator["Starter"]:
    """`starter.py` with this test's servers."""
    passphrase = tmp_path / "passphrase"
    passphrase.write_bytes(PASSPHRASE)
    yield Starter(
        tmp_path,
        {
            "TIDEGATE_DATABASE_URL": db.url,
            "TIDEGATE_TEMPORAL_ADDRESS": temporal.service_client.config.target_host,
            "TIDEGATE_CA_DIR": str(tmp_path / "ca"),
            "TIDEGATE_CA_PASSPHRASE_FILE": str(passphrase),
            "TIDEGATE_ENROLMENT_URL": door.url,
            "TIDEGATE_STATE_DIR": str(tmp_path / "state"),
            "TIDEGATE_ACTOR": "alice",
        },
    )


class Starter:
    """Runs commands in a thread: they have an event loop of their own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment

    async def __call__(self, *arguments: object, status: int = 0) -> Ran:
        ran = await asyncio.to_thread(lambda: run(*arguments, **self.environment))
        assert ran.status == status, (ran.out, ran.err)
        return ran

    async def batch(self, *options: object, name: str = "line-4", out: str = "claim") -> Path:
        """A batch's claim."""
        folder = self.folder / out
        await self(
            "claim",
            "create",
            name,
            "--type",
            "motor",
            "--site",
            "plant-1",
            "--max-devices",
            10,
            "--out",
            folder,
            *options,
        )
        return folder


async def test_a_batch_is_made_shown_and_used_by_a_device_played_by_hand(
    starter: Starter, door: Door, db: Database, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"interval": 5}')
    claim = await starter.batch("--config", config, "--id-prefix", "motor-", "--tag", "line=4", "--expires", "30d")
    assert stat.S_IMODE((claim / "claim.key").stat().st_mode) == 0o600
    shown = (await starter("claim", "show", "line-4", "--json")).json
    assert (shown["max_devices"], shown["enrolled"], shown["config"], shown["tags"]) == (
        10,
        0,
        {"interval": 5},
        {"line": "4"},
    )

    out = tmp_path / "device"
    ran = await starter("device", "enroll", "SN-1", "--claim", claim, "--out", out)
    assert "mosquitto_pub" in ran.err
    assert (out / "thing-name").read_text() == "motor-SN-1\n"
    assert stat.S_IMODE((out / "key.pem").stat().st_mode) == 0o600
    certificate = x509.load_pem_x509_certificate((out / "cert.pem").read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=motor-SN-1"
    assert (out / "ca.pem").read_text() == door.ca.read_text()
    device = door.client((out / "cert.pem", out / "key.pem"))
    assert (await device.post(CONFIRM)).status_code == 204

    listed = (await starter("claim", "list", "--json")).json["batches"]
    assert [(each["name"], each["enrolled"]) for each in listed] == [("line-4", 1)]
    found = (await starter("enrolment", "list", "--json", "--status", "issued")).json["enrolments"]
    assert [(each["serial_number"], each["device_id"]) for each in found] == [("SN-1", "motor-SN-1")]
    assert "motor-SN-1" in (await starter("enrolment", "show", found[0]["enrolment_no"])).out


async def test_a_list_of_serial_numbers_limits_a_batch_and_grows(starter: Starter, tmp_path: Path) -> None:
    serials = tmp_path / "serials.txt"
    serials.write_text("SN-1\nSN-2\n\n")
    claim = await starter.batch("--serials", serials)
    refused = await starter("device", "enroll", "SN-3", "--claim", claim, "--out", tmp_path / "d3", status=6)
    assert "not on the list of batch line-4" in refused.err
    assert (await starter("claim", "allow", "line-4", "SN-3", "SN-1")).out.strip() == "1 of 2 are new"
    await starter("device", "enroll", "SN-3", "--claim", claim, "--out", tmp_path / "d3")
    await starter.batch(name="line-5", out="other")
    taken = await starter("claim", "allow", "line-5", "SN-9", "SN-1", status=6)
    assert "it is on that of batch line-4" in taken.err
    assert (await starter("claim", "show", "line-5", "--json")).json["listed"] == 0


async def test_disabling_a_batch_is_one_command(starter: Starter, tmp_path: Path) -> None:
    claim = await starter.batch()
    await starter("claim", "disable", "line-4", "--reason", "key was seen in a log")
    refused = await starter("device", "enroll", "SN-1", "--claim", claim, "--out", tmp_path / "d1", status=6)
    assert "batch line-4 is disabled" in refused.err


async def test_a_person_approves_and_rejects(starter: Starter, door: Door, db: Database, tmp_path: Path) -> None:
    claim = await starter.batch("--approval", "manual")
    early = await starter(
        "device", "enroll", "SN-1", "--claim", claim, "--out", tmp_path / "SN-1", "--wait", "1s", status=5
    )
    assert "no certificate within 1 s: batch line-4 asks for a person's approval; the same command" in early.err
    waiting = [
        asyncio.create_task(asyncio.to_thread(enroll, door.url, serial, claim, tmp_path / serial, 30.0, print))
        for serial in ("SN-1", "SN-2")
    ]
    await until(db, "SELECT count(*) = 2 FROM enrolments WHERE state = 'waiting'")
    numbers = await column(db, "SELECT enrolment_no FROM enrolments ORDER BY serial_number")
    approved = (await starter("enrolment", "approve", numbers[0], "--json")).json
    assert (approved["state"], approved["decided_by"]) == ("issued", "alice")
    rejected = (await starter("enrolment", "reject", numbers[1], "--reason", "not ours", "--json")).json
    assert (rejected["state"], rejected["decided_by"]) == ("refused", "alice")
    again = await starter("enrolment", "approve", numbers[0], status=6)
    assert "it is issued, expected waiting" in again.err
    assert (await waiting[0]).device_id == "SN-1"
    with pytest.raises(RefusedError, match="SN-2 was refused with this key by alice"):
        await waiting[1]


async def test_a_conflict_is_resolved_in_favour_of_the_new_key(starter: Starter, db: Database, tmp_path: Path) -> None:
    claim = await starter.batch()
    await starter("device", "enroll", "SN-1", "--claim", claim, "--out", tmp_path / "old")
    await starter("device", "enroll", "SN-1", "--claim", claim, "--out", tmp_path / "new", status=6)
    number = await value(db, "SELECT enrolment_no FROM enrolments WHERE state = 'conflict'")
    await starter("enrolment", "resolve", number, status=2)
    await starter("enrolment", "resolve", number, "--accept", "--reason", "board replaced")
    await starter("enrolment", "resolve", number, "--accept", "--reason", "board replaced")
    await starter("device", "enroll", "SN-1", "--claim", claim, "--out", tmp_path / "new")
    assert await column(db, "SELECT state FROM certificates ORDER BY generation") == ["revoked", "valid"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["claim", "show", "nothing"], 2, "no claim batch 'nothing'"),
        (["enrolment", "show", 7], 2, "no enrolment 7"),
        (["claim", "create", "a/b", "--type", "m", "--site", "s", "--max-devices", 1, "--out", "x"], 2, "name"),
        (["device", "enroll", "SN-1", "--claim", "nowhere", "--out", "x"], 2, "it has no claim.key"),
        (
            [
                "claim",
                "create",
                "b",
                "--type",
                "m",
                "--site",
                "s",
                "--max-devices",
                1,
                "--out",
                "x",
                "--expires",
                "2020-01-01",
            ],
            2,
            "is over",
        ),
    ],
)
async def test_what_is_wrong_is_said(starter: Starter, arguments: list[Any], status: int, said: str) -> None:
    assert said in (await starter(*arguments, status=status)).err


async def test_an_interrupted_enrolment_goes_on_with_the_key_it_made(
    starter: Starter, door: Door, db: Database, tmp_path: Path
) -> None:
    claim, out = await starter.batch(), tmp_path / "device"
    await starter("device", "enroll", "SN-1", "--claim", claim, "--out", out)
    key = (out / "key.pem").read_bytes()
    (out / "cert.pem").unlink()
    await starter("device", "enroll", "SN-1", "--claim", claim, "--out", out)
    assert (out / "key.pem").read_bytes() == key
    assert await value(db, "SELECT count(*) FROM certificates") == 1
    with pytest.raises(InvalidInputError, match="it has a cert"):
        await asyncio.to_thread(enroll, door.url, "SN-1", claim, out, 1.0, print)
    with pytest.raises(NotFoundError, match=r"no claim\.key"):
        await asyncio.to_thread(enroll, door.url, "SN-1", tmp_path, tmp_path / "d", 1.0, print)
    with pytest.raises(RefusedError, match="a person has to decide"):
        await asyncio.to_thread(enroll, door.url, "SN-1", claim, tmp_path / "e", 1.0, print)
