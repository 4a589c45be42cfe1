"""Revocation lists and roll-over on a real PostgreSQL: signed when due, once each, and alarmed about when not."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from activities.authorities import (
    AUTHORITY_ENDING,
    CRL_NOT_RENEWED,
    CRL_NOT_SIGNED,
    AuthorityActivities,
    AuthorityWatch,
    activate_authority,
    announce_authority,
    ensure_authorities,
)
from activities.signing import CertificateSigner
from models.errors import NotFoundError, RefusedError, UnavailableError
from models.identity import (
    AlertView,
    AuthorityKind,
    AuthorityState,
    CheckAuthoritiesInput,
    PublishCrlsInput,
    PublishCrlsResult,
    RevocationReason,
)
from pki.authority import Authority, pem_of, read_certificate
from pki.issue import issue_claim
from pki.revocation import CrlFacts, verify_crl
from pki.signer import FileKeyStore
from store.access import CHANNEL, revoke
from store.alerts import AlertStore
from store.audit import AuditStore
from store.authorities import CRLS_KEPT, AuthorityStore
from store.certificates import DeviceCertificateRow
from store.engine import Database
from tests.pki_setup import PASSPHRASE, RemoteKeyStore, new_key, now

DEVICE = AuthorityKind.DEVICE
WEEK = timedelta(hours=168)


@pytest.fixture
def keys(tmp_path: Path) -> FileKeyStore:
    return FileKeyStore(tmp_path / "ca", PASSPHRASE)


async def enrolled(db: Database, keys: FileKeyStore, device: str, generation: int = 1) -> DeviceCertificateRow:
    """A device with a certificate of the active CA."""
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO devices (device_id, device_type, serial_number, site_id, status) "
            "VALUES (%s, 'motor', %s, 'hall-1', 'active') "
            "ON CONFLICT DO NOTHING",
            (device, f"SN-{device}"),
        )
        return await CertificateSigner(db, keys).issue_device(
            connection, device, generation, new_key().public_key(), "alice"
        )


async def ended(db: Database, device: str) -> None:
    async with db.pool.connection() as connection:
        await revoke(connection, device, RevocationReason.KEY_COMPROMISE, "alice", "stolen")


async def publish(db: Database, keys: FileKeyStore, **asked: bool) -> PublishCrlsResult:
    return await AuthorityActivities(db, keys).publish_crls(PublishCrlsInput(**asked))


async def newest(db: Database) -> dict[str, CrlFacts]:
    """What the newest lists say, by the name of their CA, each checked as a broker's keeper does."""
    views = {view.authority_id: view for view in await AuthorityStore(db).find()}
    return {
        views[crl.authority_id].name: verify_crl(
            crl.pem, read_certificate(views[crl.authority_id].certificate), datetime.now(UTC)
        )
        for crl in await AuthorityStore(db).newest_crls()
    }


async def age(db: Database, by: timedelta) -> None:
    """As if the newest lists' rows were so old. The signed list itself stays as it is."""
    async with db.pool.connection() as connection:
        await connection.execute(
            "UPDATE crls SET this_update = this_update - %s, next_update = next_update - %s", (by, by)
        )


async def alerts(db: Database) -> dict[str, AlertView]:
    return {alert.rule: alert for alert in await AlertStore(db).find()}


async def barred(db: Database) -> set[str]:
    async with db.pool.connection() as connection:
        rows = await connection.execute("SELECT device_id FROM devices WHERE barred_at IS NOT NULL")
        return {row[0] for row in await rows.fetchall()}


# --- lists -----------------------------------------------------------------------------------------------------------


async def test_a_list_is_signed_for_a_revocation_and_stands_until_the_next(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    first = await enrolled(db, keys, "motor-1")
    assert await publish(db, keys) == PublishCrlsResult(standing=1)
    await ended(db, "motor-1")
    [signed] = (await publish(db, keys)).signed
    assert (signed.number, signed.revoked, signed.reason) == (2, 1, "1 certificate revoked since list 1")
    assert (await publish(db, keys)).signed == ()
    [facts] = (await newest(db)).values()
    assert facts.serials == {first.serial_hex}
    [line] = await AuditStore(db).find(action="crl.signed")
    assert (line.actor, line.details["number"], line.reason) == ("upkeep", 2, signed.reason)


async def test_brokers_are_told_of_a_new_list(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    async with await psycopg.AsyncConnection.connect(db.url, autocommit=True) as listener:
        await listener.execute(f"LISTEN {CHANNEL}".encode())
        await publish(db, keys, force=True)
        told = [notice async for notice in listener.notifies(timeout=5, stop_after=1)]
    assert [notice.channel for notice in told] == [CHANNEL]


async def test_a_list_is_renewed_when_a_quarter_of_its_life_is_over(
    db: Database, keys: FileKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ensure_authorities(db, keys, now() - WEEK / 4 - timedelta(minutes=10), "alice")
    [signed] = (await publish(db, keys)).signed
    assert (signed.number, signed.reason) == (2, "a quarter of the life of list 1 is over")
    assert (await publish(db, keys)).standing == 1


async def test_a_list_that_was_damaged_or_has_ended_is_replaced(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now() - timedelta(days=30), "alice")
    [signed] = (await publish(db, keys)).signed
    assert "list 1 of" in signed.reason
    assert "it has ended at" in signed.reason
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE crls SET pem = left(pem, 100)")
    assert [one.number for one in (await publish(db, keys)).signed] == [3]
    assert len(await newest(db)) == 1


async def test_twenty_workers_that_publish_at_once_sign_one_list(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    for number in range(5):
        await enrolled(db, keys, f"motor-{number}")
        await ended(db, f"motor-{number}")
    results = await asyncio.gather(*(publish(db, keys) for _ in range(20)))
    assert [one.number for result in results for one in result.signed] == [2]
    [facts] = (await newest(db)).values()
    assert len(facts.serials) == 5


async def test_a_revocation_that_commits_while_a_list_is_signed_is_in_the_next(
    db: Database, keys: FileKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is before the list's, so a comparison of times would miss it for ever."""
    await ensure_authorities(db, keys, now(), "alice")
    await enrolled(db, keys, "motor-1")
    async with db.pool.connection() as connection:
        await revoke(connection, "motor-1", RevocationReason.SUPERSEDED, "alice", "renewed")
        await publish(db, keys, force=True)
    assert [facts.serials for facts in (await newest(db)).values()] == [frozenset()]
    assert len((await publish(db, keys)).signed) == 1
    assert [len(facts.serials) for facts in (await newest(db)).values()] == [1]


async def test_certificates_are_issued_while_a_list_is_being_signed(db: Database, keys: FileKeyStore) -> None:
    """A slow signer holds up lists, not devices."""
    views = await ensure_authorities(db, keys, now(), "alice")
    async with db.pool.connection() as connection:
        await connection.execute(
            "SELECT FROM authorities WHERE authority_id = %s FOR NO KEY UPDATE", (views[DEVICE].authority_id,)
        )
        assert await asyncio.wait_for(enrolled(db, keys, "motor-1"), 5)


async def test_what_has_ended_by_itself_leaves_the_list(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    for device in ("motor-1", "motor-2"):
        await enrolled(db, keys, device)
        await ended(db, device)
    async with db.pool.connection() as connection:
        await connection.execute(
            "UPDATE certificates SET not_after = now() - interval '2 days' WHERE device_id = 'motor-1'"
        )
    await publish(db, keys)
    assert [len(facts.serials) for facts in (await newest(db)).values()] == [1]


async def test_old_lists_are_not_kept_for_ever(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    for _ in range(CRLS_KEPT + 3):
        await publish(db, keys, force=True)
    async with db.pool.connection() as connection:
        row = await (await connection.execute("SELECT count(*), max(number) FROM crls")).fetchone()
    assert row == (CRLS_KEPT, CRLS_KEPT + 4)


async def test_a_list_signed_in_a_transaction_that_fails_takes_no_number(
    db: Database, keys: FileKeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ensure_authorities(db, keys, now(), "alice")

    async def fails(*_: object, **__: object) -> None:
        raise UnavailableError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr("activities.authorities.append_audit", fails)
        with pytest.raises(UnavailableError):
            await publish(db, keys, force=True)
    [signed] = (await publish(db, keys, force=True)).signed
    assert signed.number == 2


# --- alarms ----------------------------------------------------------------------------------------------------------


async def test_a_key_that_is_lost_is_an_alert_until_a_list_is_signed_again(
    db: Database, keys: FileKeyStore, tmp_path: Path
) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    lost = FileKeyStore(tmp_path / "other", PASSPHRASE)
    result = await publish(db, lost, force=True)
    assert len(result.failed) == 1
    assert "made on another machine, or is lost" in (await alerts(db))[CRL_NOT_SIGNED].text
    await publish(db, keys, force=True)
    assert await alerts(db) == {}


async def test_a_signer_that_does_not_answer_is_tried_again(db: Database) -> None:
    class Away(RemoteKeyStore):
        def open(self, key_reference: str) -> None:  # type: ignore[override]
            raise ConnectionError("the signer does not answer")

    there = RemoteKeyStore()
    await ensure_authorities(db, there, now(), "alice")
    with pytest.raises(ConnectionError):
        await AuthorityActivities(db, Away()).publish_crls(PublishCrlsInput(force=True))
    assert await alerts(db) == {}
    assert len((await AuthorityActivities(db, there).publish_crls(PublishCrlsInput(force=True))).signed) == 1


async def test_the_alarm_comes_at_half_of_a_lists_life_and_long_before_it_ends(
    db: Database, keys: FileKeyStore
) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    watch = AuthorityWatch(db)
    await age(db, WEEK / 2 - timedelta(hours=1))
    assert (await watch.check_authorities(CheckAuthoritiesInput())).alerts == ()
    await age(db, timedelta(hours=2))
    [text] = (await watch.check_authorities(CheckAuthoritiesInput())).alerts
    assert "past half of its life and ends in 8" in text
    await watch.check_authorities(CheckAuthoritiesInput())
    alert = (await alerts(db))[CRL_NOT_RENEWED]
    assert (alert.text, alert.occurrences) == (text, 2)
    await publish(db, keys, force=True)
    await watch.check_authorities(CheckAuthoritiesInput())
    assert await alerts(db) == {}


async def test_an_authority_that_ends_within_a_year_is_an_alert_until_it_is_rolled(
    db: Database, keys: FileKeyStore
) -> None:
    await ensure_authorities(db, keys, now(), "alice", days=100)
    watch = AuthorityWatch(db)
    texts = (await watch.check_authorities(CheckAuthoritiesInput())).alerts
    assert len(texts) == 3
    assert any("'starter.py ca roll device' makes its successor" in text for text in texts)
    for kind in AuthorityKind:
        await rolled(db, keys, kind)
    assert (await watch.check_authorities(CheckAuthoritiesInput())).alerts == ()
    assert AUTHORITY_ENDING not in await alerts(db)


# --- roll-over -------------------------------------------------------------------------------------------------------


async def rolled(db: Database, keys: FileKeyStore, kind: AuthorityKind = DEVICE) -> None:
    view, revision = await announce_authority(db, keys, kind, "alice", "it is time")
    await activate_authority(db, view, revision, "alice", "it is time", within=timedelta(0))


async def test_after_a_roll_over_devices_of_both_authorities_are_believed_and_both_have_lists(
    db: Database, keys: FileKeyStore
) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    old = await enrolled(db, keys, "motor-1")
    await rolled(db, keys)
    new = await enrolled(db, keys, "motor-2")
    store = AuthorityStore(db)
    trusted = await store.trusted(DEVICE)
    assert [view.state for view in trusted] == [AuthorityState.ACTIVE, AuthorityState.TRUSTED]
    assert [view.authority_id for view in trusted] == [new.authority_id, old.authority_id]
    assert len(await newest(db)) == 2, "OpenSSL refuses every device of a CA without a list"
    await ended(db, "motor-1")
    await ended(db, "motor-2")
    assert len((await publish(db, keys)).signed) == 2
    lists = await newest(db)
    assert {name: len(facts.serials) for name, facts in lists.items()} == {view.name: 1 for view in trusted}
    lines = await AuditStore(db).find(subject_kind="authority", subject=new.authority_id)
    assert [line.action for line in reversed(lines)][:2] == ["authority.announced", "authority.activated"]


async def test_an_announced_authority_issues_only_when_every_broker_knows_it(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    store = AuthorityStore(db)
    before = await store.active(DEVICE)
    view, revision = await announce_authority(db, keys, DEVICE, "alice")
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO brokers (broker_id, applied_revision) VALUES ('east', %s)", (revision - 1,)
        )
        await connection.execute(
            "INSERT INTO brokers (broker_id, seen_at) VALUES ('gone for good', now() - interval '1 day')"
        )
    with pytest.raises(RefusedError, match=r"east did not take up revision .* it stays announced"):
        await activate_authority(db, view, revision, "alice", within=timedelta(seconds=0.5))
    assert (await store.active(DEVICE)).authority_id == before.authority_id
    again, revision_again = await announce_authority(db, keys, DEVICE, "alice")
    assert (again.authority_id, revision_again) == (view.authority_id, revision), "the announced one is taken up"
    waiting = asyncio.create_task(activate_authority(db, view, revision, "alice", within=timedelta(seconds=20)))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE brokers SET applied_revision = %s WHERE broker_id = 'east'", (revision,))
    assert (await waiting).state is AuthorityState.ACTIVE


async def test_an_authority_that_issues_or_is_in_use_is_not_retired(db: Database, keys: FileKeyStore) -> None:
    views = await ensure_authorities(db, keys, now(), "alice")
    first, store = views[DEVICE], AuthorityStore(db)
    await enrolled(db, keys, "motor-1")
    with pytest.raises(RefusedError, match=r"'starter\.py ca roll device' makes its successor first"):
        await store.retire(first.authority_id, "alice")
    await rolled(db, keys)
    with pytest.raises(RefusedError, match="1 device certificates of it are valid"):
        await store.retire(first.name, "alice")
    await ended(db, "motor-1")
    view, revoked = await store.retire(first.authority_id[:12], "alice", "all are over")
    assert (view.state, revoked) == (AuthorityState.RETIRED, 0)
    assert await store.retire(first.authority_id, "alice") == (view, 0)
    assert first.name not in await newest(db)
    assert len((await publish(db, keys, force=True)).signed) == 1
    with pytest.raises(RefusedError, match="it is retired"):
        await store.activate(first.authority_id, "alice")


async def test_an_authority_that_is_cut_off_takes_its_certificates_with_it_and_bars_who_has_no_other(
    db: Database, keys: FileKeyStore
) -> None:
    """Its key was stolen, say. From the commit on the gateway does not listen to devices of it."""
    views = await ensure_authorities(db, keys, now(), "alice")
    await enrolled(db, keys, "only-old")
    await enrolled(db, keys, "both")
    await rolled(db, keys)
    await enrolled(db, keys, "both", 2)
    await enrolled(db, keys, "only-new")
    store = AuthorityStore(db)
    revision = await store.revision()
    _, revoked = await store.retire(views[DEVICE].authority_id, "alice", "its key was stolen", cut_off=True)
    assert revoked == 2
    assert await barred(db) == {"only-old"}
    assert await store.revision() == revision + 1
    actions = [(line.action, line.reason) for line in await AuditStore(db).find(subject="only-old")]
    assert set(actions[:2]) == {("device.barred", "its key was stolen"), ("certificate.revoked", "its key was stolen")}
    assert [line.action for line in await AuditStore(db).find(subject="only-new")] == ["certificate.issued"]


async def test_a_claim_authority_is_not_retired_while_batches_use_it(db: Database, keys: FileKeyStore) -> None:
    views = await ensure_authorities(db, keys, now(), "alice")
    claim = views[AuthorityKind.CLAIM]
    ours = Authority(read_certificate(claim.certificate), keys.open(claim.key_reference))
    pem = issue_claim(ours, new_key().public_key(), "line-7", now(), now() + timedelta(days=9))
    async with db.pool.connection() as connection:
        await connection.execute(
            "INSERT INTO claim_batches (name, device_type, site_id, max_devices, claim_certificate, claim_certificate_id, "
            "expires_at) VALUES ('line-7', 'motor', 'hall-1', 9, %s, 'x', now() + interval '9 days')",
            (pem_of(pem),),
        )
    await rolled(db, keys, AuthorityKind.CLAIM)
    store = AuthorityStore(db)
    with pytest.raises(RefusedError, match="claim certificates of line-7 are of it"):
        await store.retire(claim.authority_id, "alice")
    async with db.pool.connection() as connection:
        await connection.execute("UPDATE claim_batches SET disabled_at = now()")
    assert (await store.retire(claim.authority_id, "alice"))[0].state is AuthorityState.RETIRED


async def test_there_is_nothing_to_roll_before_there_is_something(db: Database, keys: FileKeyStore) -> None:
    with pytest.raises(NotFoundError, match=r"starter\.py ca init"):
        await announce_authority(db, keys, DEVICE, "alice")


async def test_a_certificate_that_is_being_issued_is_counted_before_its_authority_is_retired(
    db: Database, keys: FileKeyStore
) -> None:
    views = await ensure_authorities(db, keys, now(), "alice")
    store, signer = AuthorityStore(db), CertificateSigner(db, keys)
    async with db.pool.connection() as connection:
        await signer.issue_device(connection, "motor-1", 1, new_key().public_key(), "alice")
        await rolled(db, keys)
        retiring = asyncio.create_task(store.retire(views[DEVICE].authority_id, "alice"))
        await asyncio.sleep(0.3)
        assert not retiring.done()
    with pytest.raises(RefusedError, match="1 device certificates of it are valid"):
        await retiring
