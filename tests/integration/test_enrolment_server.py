"""The enrolment server as a device meets it: real TLS, PostgreSQL and Temporal; what it gives, and to whom."""

import asyncio
import base64
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from temporalio.client import Client
from temporalio.service import RPCError

from enrolment import est, tls
from models.identity import AuthorityKind, DeviceHappening, ProvisionOutcome, RevocationReason
from models.ids import reissue_workflow_id
from pki.authority import make_authority, pem_of
from pki.keys import spki_sha256
from pki.pkcs7 import read_certs_only
from store import peers, provisioning
from store.access import revoke
from store.engine import Database
from store.waits import expect
from tests.integration.enrolment_setup import (
    CACERTS,
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
    request_for,
    serving,
    tell,
    value,
    working,
    write_pair,
)


async def enrolled(door: Door, claim: httpx.AsyncClient, serial: str = "SN-1") -> tuple[Path, Path]:
    """A device's certificate and key, as files."""
    key = new_key()
    return door.own(f"device-{serial}", await claim.post(ENROLL, content=body_for(serial, key), headers=PKCS10), key)


async def test_a_device_enrols_connects_is_configured_and_becomes_active_in_at_most_45_events(
    door: Door, db: Database, pki: Pki, temporal: Client
) -> None:
    claim = door.client(await pki.batch(db, config={"interval": 5}, id_prefix="motor-", tags={"line": "4"}))
    answer = await claim.post(ENROLL, content=body_for("SN0017", new_key()), headers=PKCS10)
    certificate = certificate_of(answer)
    assert answer.headers["content-transfer-encoding"] == "base64"
    assert [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == ["motor-SN0017"]
    assert await value(db, "SELECT status FROM devices") == "provisioning"
    assert await value(db, "SELECT desired_config FROM devices") == {"interval": 5}

    await tell(db, "motor-SN0017", DeviceHappening.CONNECTED)
    await tell(db, "motor-SN0017", DeviceHappening.CONFIGURED, version=1)
    await until(db, "SELECT status = 'configured' FROM devices")
    await tell(db, "motor-SN0017", DeviceHappening.HEARTBEAT)
    handle = temporal.get_workflow_handle("provision:SN0017")
    result = await handle.result()
    assert result["outcome"] == ProvisionOutcome.ACTIVE
    assert await value(db, "SELECT status FROM devices") == "active"
    assert await value(db, "SELECT state FROM enrolments") == "active"
    assert await value(db, "SELECT confirmed_at IS NOT NULL FROM certificates")
    assert await value(db, "SELECT count(*) FROM device_waits") == 0
    actions = await column(db, "SELECT action FROM audit_events WHERE subject IN ('SN0017', 'motor-SN0017') ORDER BY 1")
    assert actions == [
        "certificate.issued",
        "configuration.wanted",
        "device.activated",
        "device.created",
        "enrolment.requested",
    ]
    assert len((await handle.fetch_history()).events) <= 45


async def test_the_certificate_has_the_registrys_name_for_the_device(door: Door, db: Database, pki: Pki) -> None:
    claim, key = door.client(await pki.batch(db)), new_key()
    certificate = certificate_of(await claim.post(ENROLL, content=body_for("SN.1", key), headers=PKCS10))
    device_id = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    assert device_id == await value(db, "SELECT device_id FROM devices WHERE serial_number = 'SN.1'")
    assert "." not in str(device_id)
    assert certificate.public_key() == key.public_key()


@pytest.mark.parametrize("encoding", ["base64", "lines", "pem", "der"])
async def test_a_request_may_come_as_base64_pem_or_der(door: Door, db: Database, pki: Pki, encoding: str) -> None:
    claim, request = door.client(await pki.batch(db)), request_for("SN-1", new_key())
    der = request.public_bytes(Encoding.DER)
    bodies = {
        "base64": base64.b64encode(der),
        "lines": base64.encodebytes(der),
        "pem": request.public_bytes(Encoding.PEM),
        "der": der,
    }
    certificate_of(await claim.post(ENROLL, content=bodies[encoding], headers=PKCS10))


async def test_what_is_no_request_gets_400_and_a_sentence(door: Door, db: Database, pki: Pki) -> None:
    claim = door.client(await pki.batch(db))
    for content, headers, said in (
        (b"", PKCS10, "it is empty"),
        (b"x" * 20_000, PKCS10, "at most 8192 bytes"),
        (b"AAAA", PKCS10, "not PKCS#10"),
        (body_for("SN-1", new_key()), {"Content-Type": "application/json"}, "expected Content-Type application/pkcs10"),
    ):
        answer = await claim.post(ENROLL, content=content, headers=headers)
        assert (answer.status_code, said in answer.text, answer.text.count("\n")) == (400, True, 1), answer.text
    assert await value(db, "SELECT count(*) FROM enrolments") == 0


async def test_a_body_that_does_not_come_is_not_waited_for_long(
    door: Door, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b"MIIB"
        await asyncio.sleep(5)

    monkeypatch.setattr(est, "BODY_SECONDS", 0.3)
    claim = door.client(await pki.batch(db))
    answer = await claim.post(ENROLL, content=drip(), headers=PKCS10)
    assert (answer.status_code, "did not come within" in answer.text) == (400, True)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /.well-known/est/cacerts HTTP/1.1\r\nHost: a\r\n",
        b"GET /.well-known/est/cacerts HTTP/1.1\r\nHost: a\r\n\r\nGET /",
        b"POST /.well-known/est/simpleenroll HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half a second head", "a body after the answer"],
)
async def test_a_connection_on_which_no_whole_request_comes_is_ended(
    door: Door, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """A stranger needs no certificate to connect: a few hundred such connections would keep devices out."""
    monkeypatch.setattr(tls, "HEAD_SECONDS", 1.0)
    context = ssl.create_default_context(cafile=str(door.ca))
    reader, writer = await asyncio.open_connection(*door.url.removeprefix("https://").split(":"), ssl=context)

    async def drip() -> None:
        while True:
            writer.write(sent[:1] and b"x")
            await writer.drain()
            await asyncio.sleep(0.1)

    writer.write(sent)
    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(3):
            with suppress(ConnectionError):
                while await reader.read(1000):
                    pass
    finally:
        dripping.cancel()
        with suppress(asyncio.CancelledError, ConnectionError):
            await dripping
        writer.close()


async def test_cacerts_needs_no_certificate_and_gives_the_service_and_device_authorities(door: Door, pki: Pki) -> None:
    answer = await door.client().get(CACERTS)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/pkcs7-mime")
    found = {pem_of(each) for each in read_certs_only(base64.b64decode(answer.content))}
    kinds = (AuthorityKind.SERVICE, AuthorityKind.DEVICE)
    assert found == {pki.authorities[kind].certificate for kind in kinds}


async def test_curl_and_openssl_alone_enrol_a_device(door: Door, db: Database, pki: Pki, tmp_path: Path) -> None:
    pem, key = await pki.batch(db)

    def ran(command: str) -> str:
        return subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30
        ).stdout

    commands = (
        "openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
        "openssl req -new -key key.pem -subj /serialNumber=SN-1 -outform DER | openssl base64 -e > req.b64",
        f"curl -sS --fail-with-body --cacert {door.ca} --cert {pem} --key {key} --data-binary @req.b64 "
        f'-H "Content-Type: application/pkcs10" {door.url}{ENROLL} -o cert.p7',
        "openssl base64 -d -in cert.p7 | openssl pkcs7 -inform DER -print_certs -out cert.pem",
    )
    for each in commands:
        await asyncio.to_thread(ran, each)
    subject = await asyncio.to_thread(ran, "openssl x509 -in cert.pem -noout -subject -nameopt RFC2253")
    assert subject.strip() == "subject=CN=SN-1"
    confirm = (
        f"curl -sS -o /dev/null -w '%{{http_code}}' --cacert {door.ca} --cert cert.pem --key key.pem -X POST "
        f"{door.url}{CONFIRM}"
    )
    assert await asyncio.to_thread(ran, confirm) == "204"
    assert await value(db, "SELECT confirmed_at IS NOT NULL FROM certificates")


# --- who may ask for what ------------------------------------------------------------------------------------------------


async def test_who_shows_no_certificate_gets_401_and_who_shows_the_wrong_one_403(
    door: Door, db: Database, pki: Pki
) -> None:
    claim, nobody = door.client(await pki.batch(db)), door.client()
    device = door.client(await enrolled(door, claim))
    body = body_for("SN-1", new_key())
    for path in (ENROLL, REENROLL, CONFIRM):
        answer = await nobody.post(path, content=body, headers=PKCS10)
        assert (answer.status_code, answer.headers["content-type"]) == (401, "text/plain; charset=utf-8")
    for path in (REENROLL, CONFIRM):
        answer = await claim.post(path, content=body, headers=PKCS10)
        assert (answer.status_code, answer.text) == (403, "expected a device certificate, got a claim certificate\n")
    answer = await device.post(ENROLL, content=body, headers=PKCS10)
    assert (answer.status_code, "device certificate" in answer.text) == (403, True)
    assert await value(db, "SELECT count(*) FROM certificates") == 1


async def test_a_certificate_of_a_stranger_ends_the_handshake(door: Door, tmp_path: Path) -> None:
    from datetime import UTC, datetime

    key = new_key()
    stranger = make_authority(AuthorityKind.DEVICE, "stranger", key, datetime.now(UTC), 10)
    with pytest.raises(httpx.TransportError):
        await door.client(write_pair(tmp_path, "stranger", pem_of(stranger), key)).get(CACERTS)


async def test_a_revoked_device_certificate_is_refused_from_the_commit_on(door: Door, db: Database, pki: Pki) -> None:
    device = door.client(await enrolled(door, door.client(await pki.batch(db))))
    assert (await device.post(CONFIRM)).status_code == 204
    async with db.pool.connection() as connection:
        await revoke(connection, "SN-1", RevocationReason.KEY_COMPROMISE, "alice", "lost")
    for path in (CONFIRM, REENROLL):  # on the connection that was open before
        answer = await device.post(path, content=body_for("SN-1", new_key()), headers=PKCS10)
        assert (answer.status_code, answer.text) == (403, "this certificate of SN-1 is revoked\n")
    assert await value(db, "SELECT count(*) FROM certificates") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE certificates SET not_after = now() - interval '1 s'", "this certificate of SN-1 has expired"),
        ("UPDATE devices SET status = 'retired'", "device SN-1 is retired"),
        ("UPDATE devices SET barred_at = now(), barred_reason = 'cloned'", "device SN-1 is barred: cloned"),
        (
            "UPDATE authorities SET state = 'retired' WHERE kind = 'device'",
            "the authority of this certificate is retired",
        ),
    ],
)
async def test_a_device_certificate_that_is_worth_nothing_any_more_gets_a_sentence(
    door: Door, db: Database, pki: Pki, change: str, said: str
) -> None:
    device = door.client(await enrolled(door, door.client(await pki.batch(db))))
    async with db.pool.connection() as connection:
        await connection.execute(change.encode())
    answers = [
        await device.post(CONFIRM),
        await device.post(REENROLL, content=body_for("SN-1", new_key()), headers=PKCS10),
    ]
    assert [(answer.status_code, answer.text) for answer in answers] == [(403, f"{said}\n")] * 2


async def test_mutant_without_the_look_at_the_registry_a_revoked_device_gets_its_next_certificate(
    door: Door, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = door.client(await enrolled(door, door.client(await pki.batch(db))))
    async with db.pool.connection() as connection:
        await revoke(connection, "SN-1", RevocationReason.KEY_COMPROMISE, "alice", "lost")
    monkeypatch.setattr(
        peers,
        "_DEVICE",
        peers._DEVICE.replace("c.state <> 'valid'", "FALSE").replace("d.barred_at IS NOT NULL", "FALSE"),
    )
    answer = await device.post(REENROLL, content=body_for("SN-1", new_key()), headers=PKCS10)
    assert answer.status_code == 403, "the transaction that issues looks, too"
    monkeypatch.setattr(provisioning, "why_not_reissue", lambda *_: "")
    assert (await device.post(REENROLL, content=body_for("SN-1", new_key()), headers=PKCS10)).status_code == 200


# --- later certificates --------------------------------------------------------------------------------------------------


async def test_a_device_gets_its_next_certificate_for_a_new_key_and_confirms_it(
    door: Door, db: Database, pki: Pki
) -> None:
    device = door.client(await enrolled(door, door.client(await pki.batch(db))))
    async with db.pool.connection() as connection:
        await expect(connection, "SN-1", "rotate:SN-1", {DeviceHappening.CERTIFICATE_CONFIRMED: None})
    key = new_key()
    answers = [await device.post(REENROLL, content=body_for("SN-1", key), headers=PKCS10) for _ in range(2)]
    assert len({certificate_of(answer) for answer in answers}) == 1
    assert await column(db, "SELECT generation FROM certificates ORDER BY 1") == [1, 2]
    assert await column(db, "SELECT state FROM certificates") == ["valid", "valid"]
    later = door.client(door.own("next", answers[0], key))
    assert (await later.post(CONFIRM)).status_code == 204
    assert await value(db, "SELECT confirmed_at IS NOT NULL FROM certificates WHERE generation = 2")
    assert await value(db, "SELECT count(*) FROM device_waits WHERE workflow_id = 'rotate:SN-1'") == 0


async def test_a_device_gets_certificates_for_itself_alone_and_never_two_for_a_key(
    door: Door, db: Database, pki: Pki
) -> None:
    claim, key = door.client(await pki.batch(db)), new_key()
    device = door.client(door.own("one", await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10), key))
    other = new_key()
    certificate_of(await claim.post(ENROLL, content=body_for("SN-2", other), headers=PKCS10))
    for serial, used, said in (
        ("SN-2", new_key(), "a device gets certificates for itself alone"),
        ("SN-1", key, "the key that has a certificate already"),
        ("SN-1", other, "the key that came has been used already"),
    ):
        answer = await device.post(REENROLL, content=body_for(serial, used), headers=PKCS10)
        assert (answer.status_code, said in answer.text) == (403, True), answer.text
    assert await value(db, "SELECT count(*) FROM certificates") == 2


async def test_a_device_that_never_uses_its_certificates_gets_only_a_few(door: Door, db: Database, pki: Pki) -> None:
    device = door.client(await enrolled(door, door.client(await pki.batch(db))))
    statuses = [
        (await device.post(REENROLL, content=body_for("SN-1", new_key()), headers=PKCS10)).status_code for _ in range(6)
    ]
    assert statuses == [200] * 5 + [403]


# --- waiting, and servers that are away ----------------------------------------------------------------------------------


async def test_a_device_gets_only_so_many_certificates_within_a_day_however_well_it_uses_them(
    door: Door, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would be a line of the revocation list for 90 days, and a signal to every broker."""
    monkeypatch.setattr(provisioning, "MAX_A_DAY", 3)
    device = door.client(await enrolled(door, door.client(await pki.batch(db))))
    answers = [await device.post(REENROLL, content=body_for("SN-1", new_key()), headers=PKCS10) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 403]
    assert "has been given 3 certificates within 24 h" in answers[-1].text
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE certificates SET issued_at = now() - interval '25 hours'")
    again = await device.post(REENROLL, content=body_for("SN-1", new_key()), headers=PKCS10)
    assert again.status_code == 200


async def test_a_reissue_that_was_ended_is_503_and_not_an_error_of_the_server(
    db: Database, pki: Pki, temporal: Client
) -> None:
    """Nobody signs, and its time is over, or a person has terminated it."""
    async with serving(db, temporal, pki) as door:
        async with working(db, temporal, pki):
            device = door.client(await enrolled(door, door.client(await pki.batch(db))))
        key = new_key()
        asking = asyncio.create_task(device.post(REENROLL, content=body_for("SN-1", key), headers=PKCS10))
        flow = temporal.get_workflow_handle(reissue_workflow_id("SN-1", spki_sha256(key.public_key())))
        for _ in range(100):
            with suppress(RPCError):
                await flow.terminate("the test ends it")
                break
            await asyncio.sleep(0.05)
        answer = await asking
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True), answer.text


async def test_a_request_that_takes_long_is_told_to_come_again_and_joins_what_runs(
    db: Database, temporal: Client, pki: Pki
) -> None:
    key = new_key()
    async with serving(db, temporal, pki, wait_seconds=0.3) as door:
        claim = door.client(await pki.batch(db))
        answer = await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10)
        assert (answer.status_code, answer.headers["retry-after"]) == (202, "2")
        handle = temporal.get_workflow_handle("provision:SN-1")
        first = (await handle.describe()).run_id
        assert (await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10)).status_code == 202
        async with working(db, temporal, pki):
            await until(db, "SELECT state = 'issued' FROM enrolments")
            certificate_of(await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10))
            assert (await handle.describe()).run_id == first
    assert await column(db, "SELECT state FROM enrolments") == ["issued"]


async def test_when_postgresql_is_away_the_answer_is_503_with_a_time_to_come_again(
    db: Database, temporal: Client, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    from psycopg_pool import PoolTimeout

    async with serving(db, temporal, pki) as door:
        claim = door.client(await pki.batch(db))

        def away(*_: object, **__: object) -> None:
            raise PoolTimeout("no connection")

        with monkeypatch.context() as patch:
            patch.setattr(db.pool, "connection", away)
            answer = await claim.post(ENROLL, content=body_for("SN-1", new_key()), headers=PKCS10)
    assert (answer.status_code, answer.headers["retry-after"], "ask again" in answer.text) == (503, "5", True)


async def test_when_temporal_is_away_the_answer_is_503_and_the_next_request_goes_on(
    door: Door, db: Database, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    from temporalio.service import RPCError, RPCStatusCode

    from enrolment import service

    async def away(*_: object, **__: object) -> None:
        raise RPCError("away", RPCStatusCode.UNAVAILABLE, b"")

    claim, body = door.client(await pki.batch(db)), body_for("SN-1", new_key())
    with monkeypatch.context() as patch:
        patch.setattr(service, "start_provisioning", away)
        assert (await claim.post(ENROLL, content=body, headers=PKCS10)).status_code == 503
    certificate_of(await claim.post(ENROLL, content=body, headers=PKCS10))


async def test_a_new_authority_is_believed_without_a_restart(door: Door, db: Database, pki: Pki) -> None:
    from datetime import UTC, datetime, timedelta

    from activities.authorities import new_authority
    from pki.authority import Authority, certificate_id
    from pki.issue import issue_claim
    from store.authorities import AuthorityStore

    made = await new_authority(pki.keys, AuthorityKind.CLAIM, datetime.now(UTC))
    await AuthorityStore(db).announce(made, "alice")
    key, now = new_key(), datetime.now(UTC)
    authority = Authority(made.certificate, pki.keys.open(made.key_reference))
    claim = issue_claim(authority, key.public_key(), "line-5", now, now + timedelta(hours=1))
    await pki.batch(db, "line-5")
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE claim_batches SET claim_certificate_id = %s", (certificate_id(claim),))
    await asyncio.sleep(2.5)
    client = door.client(write_pair(pki.folder, "new-claim", pem_of(claim), key))
    certificate_of(await client.post(ENROLL, content=body_for("SN-1", new_key()), headers=PKCS10))


async def test_a_worker_that_is_gone_between_two_steps_is_taken_over_from(
    db: Database, temporal: Client, pki: Pki
) -> None:
    key = new_key()
    async with serving(db, temporal, pki) as door:
        claim = door.client(await pki.batch(db, config={"interval": 5}))
        async with working(db, temporal, pki, listed=False, cached=0):
            certificate_of(await claim.post(ENROLL, content=body_for("SN-1", key), headers=PKCS10))
        await tell(db, "SN-1", DeviceHappening.CONNECTED)
        async with working(db, temporal, pki, listed=False, cached=0):
            await until(db, "SELECT count(*) = 0 FROM workflow_outbox")
        await tell(db, "SN-1", DeviceHappening.CONFIGURED, version=1)
        async with working(db, temporal, pki, listed=False, cached=0):
            await until(db, "SELECT status = 'configured' FROM devices")
        await tell(db, "SN-1", DeviceHappening.HEARTBEAT)
        async with working(db, temporal, pki, cached=0):
            result = await asyncio.wait_for(temporal.get_workflow_handle("provision:SN-1").result(), 20)
    assert result["outcome"] == ProvisionOutcome.ACTIVE
    assert await column(db, "SELECT state FROM certificates") == ["valid"]


async def until(db: Database, statement: str, seconds: float = 10) -> None:
    """Wait until it is so."""
    for _ in range(int(seconds * 50)):
        if await value(db, statement):
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"never came true: {statement}")
