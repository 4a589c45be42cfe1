"""Rows 29 and 30 of the threats: one serial number with many keys, a stolen claim certificate; each defence with its mutant."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from psycopg import errors
from temporalio.client import Client

from activities import enrolment_hook
from activities.signing import CertificateSigner
from domain.enrolment import Admission, Judgement
from models.errors import ConflictError
from models.identity import DeviceHappening, EnrolmentState, IssueCertificateInput
from pki.keys import spki_sha256
from store import enrolments, provisioning
from store.claims import ClaimStore
from store.engine import Database
from store.enrolments import EnrolmentAnswer, EnrolmentRequest, EnrolmentStore
from store.peers import DevicePeer, PeerStore
from store.provisioning import ProvisioningStore
from tests.integration.enrolment_setup import (
    CONFIRM,
    ENROLL,
    PKCS10,
    REENROLL,
    Door,
    Pki,
    body_for,
    certificate_of,
    column,
    new_key,
    serving,
    tell,
    value,
    working,
)
from tests.integration.test_enrolment_server import enrolled, until

AT_ONCE = 50
ONE_LIVE = "CREATE UNIQUE INDEX enrolments_one_live ON enrolments (serial_number) WHERE state IN ('requested','waiting','issued','active')"
ONE_PER_GENERATION = "CREATE UNIQUE INDEX certificates_one_per_generation ON certificates (device_id, generation)"


def wanted(serial: str, key: Any = None) -> EnrolmentRequest:
    """A request as the server hands it to the store."""
    public = (key or new_key()).public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return EnrolmentRequest(serial, spki_sha256(public), pem)


async def claim_id(db: Database, batch: str = "line-4") -> str:
    return str(await value(db, "SELECT claim_certificate_id FROM claim_batches WHERE name = %s", batch))


async def ask(db: Database, serial: str, key: Any = None, batch: str = "line-4") -> EnrolmentAnswer:
    return await EnrolmentStore(db).request(await claim_id(db, batch), wanted(serial, key), "10.0.0.7")


async def issue(db: Database, pki: Pki, number: int) -> provisioning.IssueCertificateResult:
    asked = IssueCertificateInput(enrolment_no=number, workflow_id="provision:SN-1", actor="test")
    return await ProvisioningStore(db).issue(asked, CertificateSigner(db, pki.keys))


# --- row 29: one serial number, many keys -------------------------------------------------------------------------------


async def test_fifty_requests_at_once_with_different_keys_get_exactly_one_certificate(
    door: Door, db: Database, pki: Pki
) -> None:
    claim = door.client(await pki.batch(db))
    answers = await asyncio.gather(
        *(claim.post(ENROLL, content=body_for("SN-1", new_key()), headers=PKCS10) for _ in range(AT_ONCE))
    )
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200] + [403] * (AT_ONCE - 1)
    assert all("a person has to decide" in answer.text for answer in answers if answer.status_code == 403)
    assert await value(db, "SELECT count(*) FROM certificates") == 1
    assert await value(db, "SELECT enrolled FROM claim_batches") == 1
    assert await column(db, "SELECT subject FROM alerts WHERE rule = 'enrolment-conflict' AND state = 'open'") == [
        "SN-1"
    ]
    kept = await value(db, "SELECT count(*) FROM enrolments WHERE state = 'conflict'")
    assert 0 < kept <= enrolments.MAX_CONFLICTS


async def test_fifty_requests_at_once_with_one_key_get_one_certificate_the_same_for_all(
    door: Door, db: Database, pki: Pki
) -> None:
    claim, body = door.client(await pki.batch(db)), body_for("SN-1", new_key())
    answers = await asyncio.gather(*(claim.post(ENROLL, content=body, headers=PKCS10) for _ in range(AT_ONCE)))
    assert len({certificate_of(answer) for answer in answers}) == 1
    assert await value(db, "SELECT count(*) FROM certificates") == 1
    assert await value(db, "SELECT count(*) FROM enrolments") == 1


def without_the_codes_checks(patch: pytest.MonkeyPatch) -> None:
    """No lock on the batch, no look at what is live, every request admitted."""

    async def nobody(*_: object) -> None:
        return None

    patch.setattr(enrolments, "_BATCH", enrolments._BATCH.replace("FOR UPDATE", ""))
    patch.setattr(enrolments, "_live", nobody)
    patch.setattr(enrolments, "judge_request", lambda *_: Judgement(Admission.ADMIT))


async def test_mutant_without_the_codes_checks_the_databases_constraint_still_admits_one_key(
    db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pki.batch(db)
    without_the_codes_checks(monkeypatch)
    answers = await asyncio.gather(*(ask(db, "SN-1") for _ in range(AT_ONCE)))
    assert sum(answer.state is EnrolmentState.REQUESTED for answer in answers) == 1
    issued = [await issue(db, pki, answer.enrolment_no) for answer in answers if answer.enrolment_no is not None]
    assert sum(not each.refused for each in issued) == 1
    assert await value(db, "SELECT count(*) FROM certificates") == 1


async def test_mutant_without_the_constraint_on_enrolments_that_on_generations_still_allows_one_certificate(
    db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pki.batch(db)
    without_the_codes_checks(monkeypatch)
    monkeypatch.setattr(enrolments, "_ADMIT", enrolments._ADMIT.split("ON CONFLICT")[0] + "RETURNING enrolment_no")
    monkeypatch.setattr(provisioning, "_next_generation", first_generation)
    async with without_index(db, "enrolments_one_live", ONE_LIVE):
        answers = await asyncio.gather(*(ask(db, "SN-1") for _ in range(10)))
        assert all(answer.state is EnrolmentState.REQUESTED for answer in answers)
        issued = await asyncio.gather(*(issue(db, pki, answer.enrolment_no or 0) for answer in answers))
        assert sum(not each.refused for each in issued) == 1
        assert await value(db, "SELECT count(*) FROM certificates") == 1


async def test_mutant_without_any_constraint_several_keys_get_a_certificate_for_one_serial_number(
    db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pki.batch(db)
    without_the_codes_checks(monkeypatch)
    monkeypatch.setattr(enrolments, "_ADMIT", enrolments._ADMIT.split("ON CONFLICT")[0] + "RETURNING enrolment_no")
    async with without_index(db, "enrolments_one_live", ONE_LIVE):
        answers = await asyncio.gather(*(ask(db, "SN-1") for _ in range(5)))
        for answer in answers:
            await issue(db, pki, answer.enrolment_no or 0)
        assert await value(db, "SELECT count(*) FROM certificates WHERE state = 'valid'") == 5


async def first_generation(*_: object) -> int:
    return 1


@asynccontextmanager
async def without_index(db: Database, name: str, create: str) -> AsyncIterator[None]:
    """A schema without this constraint, for the length of the block; it is there again after it."""
    async with db.pool.connection() as connection:
        await connection.execute(f"DROP INDEX {name}".encode())
    try:
        yield
    finally:
        async with db.pool.connection() as connection:
            await connection.execute("TRUNCATE enrolments, certificates")
            await connection.execute(create.encode())


# --- a person decides ---------------------------------------------------------------------------------------------------


async def test_an_accepted_conflict_revokes_the_old_key_and_gives_the_device_to_the_new_one(
    door: Door, db: Database, pki: Pki, temporal: Client
) -> None:
    from cli.enrolment import call_off

    claim = door.client(await pki.batch(db))
    old = door.client(await enrolled(door, claim))
    key = new_key()
    assert (await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10)).status_code == 403
    number = await value(db, "SELECT enrolment_no FROM enrolments WHERE state = 'conflict'")
    found = await EnrolmentStore(db).accept_conflict(number, "alice", "board was replaced")
    assert (await old.post(CONFIRM)).status_code == 403, "revoked with the commit"
    assert await value(db, "SELECT barred_at IS NOT NULL FROM devices")
    await call_off(temporal, found)
    await EnrolmentStore(db).accept_conflict(number, "alice", "board was replaced")

    new = door.own("new", await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10), key)
    assert (await door.client(new).post(CONFIRM)).status_code == 204
    assert await column(db, "SELECT state FROM certificates ORDER BY generation") == ["revoked", "valid"]
    assert await column(db, "SELECT state FROM enrolments ORDER BY enrolment_no") == ["closed", "issued"]
    assert await value(db, "SELECT count(*) FROM devices") == 1
    assert await value(db, "SELECT status = 'provisioning' AND barred_at IS NULL FROM devices")
    assert await value(db, "SELECT enrolled FROM claim_batches") == 1
    assert await value(db, "SELECT count(*) FROM alerts WHERE state = 'open'") == 0
    await tell(db, "SN-1", DeviceHappening.CONNECTED, DeviceHappening.HEARTBEAT)
    await until(db, "SELECT status = 'active' FROM devices")


async def test_only_a_conflict_can_be_resolved(door: Door, db: Database, pki: Pki) -> None:
    await enrolled(door, door.client(await pki.batch(db)))
    number = await value(db, "SELECT enrolment_no FROM enrolments")
    for decide in (EnrolmentStore(db).accept_conflict, EnrolmentStore(db).reject_conflict):
        with pytest.raises(
            ConflictError, match=f"cannot resolve enrolment {number}: it is issued, expected a conflict"
        ):
            await decide(number, "alice", "a slip")


async def test_a_rejected_conflict_leaves_the_device_alone_and_refuses_that_key_from_then_on(
    door: Door, db: Database, pki: Pki
) -> None:
    claim = door.client(await pki.batch(db))
    old = door.client(await enrolled(door, claim))
    body = body_for("SN-1", new_key())
    await claim.post(ENROLL, content=body, headers=PKCS10)
    number = await value(db, "SELECT enrolment_no FROM enrolments WHERE state = 'conflict'")
    await EnrolmentStore(db).reject_conflict(number, "alice", "not ours")
    answer = await claim.post(ENROLL, content=body, headers=PKCS10)
    assert (answer.status_code, answer.text) == (403, "serial number SN-1 was refused with this key by alice\n")
    assert (await old.post(CONFIRM)).status_code == 204
    assert await value(db, "SELECT count(*) FROM alerts WHERE state = 'open'") == 0


# --- row 30: a stolen claim certificate -----------------------------------------------------------------------------------


async def test_the_101st_device_of_a_batch_of_100_is_refused_and_one_of_the_hundred_may_ask_again(
    door: Door, db: Database, pki: Pki
) -> None:
    claim = door.client(await pki.batch(db, max_devices=100))
    keys = [new_key() for _ in range(100)]
    answers = await asyncio.gather(*(ask(db, f"SN-{n}", keys[n]) for n in range(100)))
    assert all(answer.state is EnrolmentState.REQUESTED for answer in answers)
    answer = await claim.post(ENROLL, content=body_for("SN-100", new_key()), headers=PKCS10)
    assert (answer.status_code, "batch line-4 is full: 100 of 100" in answer.text) == (403, True)
    certificate_of(await claim.post(ENROLL, content=body_for("SN-7", keys[7]), headers=PKCS10))
    assert await value(db, "SELECT enrolled FROM claim_batches") == 100


async def test_mutant_without_the_codes_count_the_databases_constraint_refuses_the_101st(
    db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    await pki.batch(db, max_devices=100)
    without_the_codes_checks(monkeypatch)
    ended = await asyncio.gather(*(ask(db, f"SN-{n}") for n in range(110)), return_exceptions=True)
    assert sum(isinstance(each, errors.CheckViolation) for each in ended) == 10
    assert await value(db, "SELECT count(*) FROM enrolments") == 100
    async with db.pool.connection() as connection:
        await connection.execute("ALTER TABLE claim_batches DROP CONSTRAINT claim_batches_not_exceeded")
    try:
        assert (await ask(db, "SN-one-too-many")).state is EnrolmentState.REQUESTED
    finally:
        async with db.pool.connection() as connection:
            await connection.execute("TRUNCATE claim_batches")
            await connection.execute(
                "ALTER TABLE claim_batches ADD CONSTRAINT claim_batches_not_exceeded "
                "CHECK (enrolled >= 0 AND enrolled <= max_devices)"
            )


async def test_each_refusal_is_one_clear_sentence(door: Door, db: Database, pki: Pki) -> None:
    listed = door.client(await pki.batch(db, "listed", listed_only=True, serials=["SN-1"]))
    opened = door.client(await pki.batch(db, "open"))
    expired = door.client(await pki.batch(db, "old", expires_at=datetime.now(UTC) - timedelta(hours=1)))
    disabled = door.client(await pki.batch(db, "gone"))
    await ClaimStore(db).disable("gone", "alice", "stolen")
    used = new_key()
    certificate_of(await opened.post(ENROLL, content=body_for("SN-8", used), headers=PKCS10))
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO tombstones (serial_number, device_id, retired_by) VALUES ('SN-9', 'motor-9', 'alice')"
        )
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status) VALUES "
            "('pump-1', 'pump', 'SN-20', 'plant-1', 'provisioning'), ('m-1', 'motor', 'SN-21', 'plant-1', 'active'), "
            "('m-2', 'motor', 'SN-22', 'plant-1', 'retired')"
        )
    cases: list[tuple[httpx.AsyncClient, str, Any, str]] = [
        (listed, "SN-2", None, "serial number SN-2 is not on the list of batch listed; 'claim allow' adds it"),
        (opened, "SN-1", None, "serial number SN-1 is on the list of another batch than open"),
        (expired, "SN-2", None, "batch old has expired on"),
        (disabled, "SN-2", None, "batch gone is disabled"),
        (opened, "SN-9", None, "serial number SN-9 was retired on"),
        (opened, "SN-10", used, "the key that came for serial number SN-10 has been used already; make a new key"),
        (opened, "SN-20", None, "serial number SN-20 is registered as a pump, batch open is for devices of type motor"),
        (opened, "SN-21", None, "serial number SN-21 is registered as active, expected provisioning"),
        (opened, "SN-22", None, "serial number SN-22 is retired in the registry"),
        (listed, "SN-8", used, "serial number SN-8 is enrolled through another batch"),
    ]
    for client, serial, key, said in cases:
        answer = await client.post(ENROLL, content=body_for(serial, key or new_key()), headers=PKCS10)
        assert answer.status_code == 403, (serial, answer.text)
        assert said in answer.text, (serial, answer.text)
        assert answer.text.count("\n") == 1
        assert answer.headers["content-type"].startswith("text/plain")
    assert await value(db, "SELECT count(*) FROM certificates") == 1


async def test_a_registered_device_is_adopted_by_its_enrolment_with_the_configuration_it_was_registered_for(
    door: Door, db: Database, pki: Pki
) -> None:
    claim = door.client(await pki.batch(db, config={"interval": 5}))
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status, desired_config) VALUES "
            "('press-7', 'motor', 'SN-7', 'plant-9', 'provisioning', '{\"interval\": 60}')"
        )
    certificate = certificate_of(await claim.post(ENROLL, content=body_for("SN-7", new_key()), headers=PKCS10))
    assert certificate.subject.rfc4514_string() == "CN=press-7"
    assert await value(db, "SELECT site_id FROM devices") == "plant-9"
    assert await value(db, "SELECT config FROM device_configurations") == {"interval": 60}


async def test_a_released_serial_number_comes_back_as_the_same_device(door: Door, db: Database, pki: Pki) -> None:
    claim = door.client(await pki.batch(db))
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status, retired_at, barred_at, "
            "barred_reason) VALUES ('m-7', 'motor', 'SN-7', 'plant-1', 'retired', now(), now(), 'decommissioned')"
        )
        await connection.execute(
            "INSERT INTO tombstones (serial_number, device_id, retired_by) VALUES ('SN-7', 'm-7', 'alice')"
        )
    body = body_for("SN-7", new_key())
    assert (await claim.post(ENROLL, content=body, headers=PKCS10)).status_code == 403
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE tombstones SET released_at = now(), released_by = 'alice'")
    certificate_of(await claim.post(ENROLL, content=body, headers=PKCS10))
    assert await value(db, "SELECT status = 'provisioning' AND barred_at IS NULL AND retired_at IS NULL FROM devices")


async def test_after_disabling_a_batch_nobody_enrols_and_its_devices_go_on_as_before(
    door: Door, db: Database, pki: Pki
) -> None:
    claim, key = door.client(await pki.batch(db)), new_key()
    device = door.client(
        door.own("device", await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10), key)
    )
    await ClaimStore(db).disable("line-4", "alice", "claim key was seen in a log")
    for used in (key, new_key()):
        answer = await claim.post(ENROLL, content=body_for("SN-1", used), headers=PKCS10)
        assert (answer.status_code, "batch line-4 is disabled" in answer.text) == (403, True)
    assert (await device.post(CONFIRM)).status_code == 204
    await tell(db, "SN-1", DeviceHappening.CONNECTED, DeviceHappening.HEARTBEAT)
    await until(db, "SELECT status = 'active' FROM devices")


async def test_a_batch_that_is_disabled_between_request_and_issue_gives_no_certificate(db: Database, pki: Pki) -> None:
    await pki.batch(db)
    answer = await ask(db, "SN-1")
    await ClaimStore(db).disable("line-4", "alice", "stolen")
    issued = await issue(db, pki, answer.enrolment_no or 0)
    assert "batch line-4 is disabled" in issued.refused
    assert await value(db, "SELECT count(*) FROM certificates") == 0
    assert await value(db, "SELECT enrolled FROM claim_batches") == 0, "the place is given back"


async def test_mutant_without_the_look_at_the_batch_a_disabled_claim_certificate_enrols(
    door: Door, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = door.client(await pki.batch(db))
    await ClaimStore(db).disable("line-4", "alice", "stolen")
    monkeypatch.setattr(enrolments, "judge_batch", lambda *_: "")
    answer = await claim.post(ENROLL, content=body_for("SN-1", new_key()), headers=PKCS10)
    assert answer.status_code == 403, "the workflow's check and the transaction that issues look, too"
    monkeypatch.setattr(provisioning, "judge_batch", lambda *_: "")
    certificate_of(await claim.post(ENROLL, content=body_for("SN-1", new_key()), headers=PKCS10))


async def test_more_requests_in_a_minute_than_are_usual_raise_an_alert(db: Database, pki: Pki) -> None:
    await pki.batch(db, alarm_per_minute=5, listed_only=True, serials=["SN-1"])
    for n in range(5):
        await ask(db, f"GUESS-{n}")
    assert await value(db, "SELECT count(*) FROM alerts") == 0
    for n in range(5, 20):
        await ask(db, f"GUESS-{n}")
    text = await value(db, "SELECT text FROM alerts WHERE rule = 'claim-rate' AND subject = 'line-4'")
    assert "more than 5 new requests within 60 s" in text
    assert await value(db, "SELECT count(*) FROM enrolments") == 6, "a guesser does not fill the table"


async def test_a_batch_for_which_no_rate_is_given_is_watched_too(
    db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolments, "USUAL_PER_MINUTE", 5)
    await pki.batch(db, listed_only=True, serials=["SN-1"])
    for n in range(20):
        await ask(db, f"GUESS-{n}")
    assert await column(db, "SELECT rule FROM alerts") == ["claim-rate"]
    assert await value(db, "SELECT count(*) FROM enrolments") == 6


async def test_mutant_without_the_count_of_requests_a_guesser_fills_the_table_and_nobody_is_told(
    db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def usual(*_: object) -> bool:
        return False

    await pki.batch(db, alarm_per_minute=5, listed_only=True, serials=["SN-1"])
    monkeypatch.setattr(enrolments, "_watch_rate", usual)
    for n in range(20):
        await ask(db, f"GUESS-{n}")
    assert await value(db, "SELECT count(*) FROM alerts") == 0
    assert await value(db, "SELECT count(*) FROM enrolments") == 20


@pytest.mark.parametrize(
    ("serial", "statement", "look"),
    [
        ("SN-2", "_BATCH", "listed_only"),
        ("SN-3", "_FACTS", "(SELECT batch FROM claim_serials WHERE serial_number = %(serial)s)"),
    ],
)
async def test_mutant_without_the_look_at_the_lists_a_serial_number_on_none_or_another_enrols(
    door: Door, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch, serial: str, statement: str, look: str
) -> None:
    listed = statement == "_BATCH"
    claim = door.client(await pki.batch(db, "line-4", listed_only=listed, serials=["SN-1"]))
    await pki.batch(db, "line-5", serials=["SN-3"])
    body = body_for(serial, new_key())
    assert (await claim.post(ENROLL, content=body, headers=PKCS10)).status_code == 403
    text = getattr(enrolments, statement)
    nothing = "FALSE AS listed_only" if listed else "NULL::text"
    monkeypatch.setattr(enrolments, statement, text.replace(look, nothing))
    certificate_of(await claim.post(ENROLL, content=body, headers=PKCS10))


async def test_mutant_without_the_looks_at_the_tombstone_a_retired_serial_number_enrols(
    door: Door, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none(*_: object) -> None:
        return None

    claim = door.client(await pki.batch(db))
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO tombstones (serial_number, device_id, retired_by) VALUES ('SN-9', 'motor-9', 'alice')"
        )
    monkeypatch.setattr(enrolments, "_FACTS", enrolments._FACTS.replace("AND released_at IS NULL", "AND FALSE"))
    answer = await claim.post(ENROLL, content=body_for("SN-9", new_key()), headers=PKCS10)
    assert (answer.status_code, "was retired on" in answer.text) == (403, True), (
        "the transaction that issues looks, too"
    )
    monkeypatch.setattr(provisioning, "_tombstone", none)
    certificate_of(await claim.post(ENROLL, content=body_for("SN-9", new_key()), headers=PKCS10))


async def test_mutant_without_the_look_at_whose_certificate_it_is_a_claim_gets_a_devices_next_certificate(
    door: Door, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def anybody(_: PeerStore, certificate_id: str) -> DevicePeer:
        return DevicePeer(certificate_id, "SN-1", "SN-1", "", "")

    claim = door.client(await pki.batch(db))
    await enrolled(door, claim)
    monkeypatch.setattr(PeerStore, "device", anybody)
    body = body_for("SN-1", new_key())
    answer = await claim.post(REENROLL, content=body, headers=PKCS10)
    assert answer.status_code == 403, "the transaction that issues looks, too"
    monkeypatch.setattr(provisioning, "why_not_reissue", lambda *_: "")
    assert (await claim.post(REENROLL, content=body, headers=PKCS10)).status_code == 200


async def test_a_device_that_asks_again_and_again_raises_no_alert(db: Database, pki: Pki) -> None:
    await pki.batch(db, alarm_per_minute=3)
    key = new_key()
    for _ in range(10):
        await ask(db, "SN-1", key)
    assert await value(db, "SELECT count(*) FROM alerts") == 0


# --- the hook -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def hook(answer: bytes | None, status: str = "200 OK") -> AsyncIterator[tuple[str, list[bytes]]]:
    """An operator's hook; None never answers."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        asked.append(await reader.readexactly(length))
        if answer is not None:
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(answer)}\r\n\r\n".encode() + answer)
            await writer.drain()
            writer.close()
        else:
            await reader.read()
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/ask", asked


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (b'{"allow": false, "reason": "unknown to the ERP"}', "200 OK", "refused: unknown to the ERP"),
        (b'{"allow": "true"}', "200 OK", "the enrolment hook refused"),
        (b'{"allow": 1}', "200 OK", "the enrolment hook refused"),
        (b"[true]", "200 OK", "no JSON object"),
        (b"yes", "200 OK", "no JSON"),
        (b'{"allow": true}', "201 Created", "answered with status 201"),
        (b'{"allow": true}', "302 Found", "answered with status 302"),
        (b"", "500 Internal Server Error", "answered with status 500"),
        (None, "", "did not answer within 5 s"),
    ],
)
async def test_a_hook_that_does_not_clearly_say_yes_is_a_no_within_six_seconds(
    db: Database, temporal: Client, pki: Pki, answer: bytes | None, status: str, said: str
) -> None:
    async with hook(answer, status) as (url, _asked):
        async with working(db, temporal, pki, hook=url), serving(db, temporal, pki) as door:
            claim = door.client(await pki.batch(db))
            began = time.monotonic()
            refused = await claim.post(ENROLL, content=body_for("SN-1", new_key()), headers=PKCS10)
            assert time.monotonic() - began < 6
    assert (refused.status_code, said in refused.text) == (403, True), refused.text
    assert await value(db, "SELECT count(*) FROM certificates") == 0
    assert await value(db, "SELECT enrolled FROM claim_batches") == 0


async def test_a_hook_that_is_down_is_a_no_and_the_device_may_ask_again(
    db: Database, temporal: Client, pki: Pki
) -> None:
    async with hook(b'{"allow": true}') as (url, asked):
        down = url.replace("/ask", "")[:-5] + "1/ask"
        key = new_key()
        async with serving(db, temporal, pki) as door:
            claim = door.client(await pki.batch(db))
            async with working(db, temporal, pki, hook=down):
                refused = await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10)
                assert (refused.status_code, "cannot be asked" in refused.text) == (403, True)
            async with working(db, temporal, pki, hook=url):
                certificate_of(await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10))
    assert len(asked) == 1
    assert b'"serial":"SN-1"' in asked[0].replace(b" ", b"")


async def test_mutant_a_hook_that_fails_open_lets_the_device_in(
    db: Database, temporal: Client, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment_hook, "_judged", lambda *_: "")
    async with hook(b'{"allow": false}') as (url, _asked):
        async with working(db, temporal, pki, hook=url), serving(db, temporal, pki) as door:
            claim = door.client(await pki.batch(db))
            certificate_of(await claim.post(ENROLL, content=body_for("SN-1", new_key()), headers=PKCS10))
