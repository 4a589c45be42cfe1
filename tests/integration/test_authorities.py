"""Certificate authorities in a real PostgreSQL: made once, rolled over, retired; certificates issued in a transaction."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from cryptography import x509

from activities.authorities import ensure_authorities
from activities.signing import CertificateSigner
from models.errors import ConflictError, InvalidInputError, NotFoundError, RefusedError, VerificationError
from models.identity import AuthorityKind, AuthorityState, RevocationReason
from pki.authority import certificate_id, read_certificate, serial_hex
from pki.revocation import verify_crl
from pki.signer import FileKeyStore
from store.access import revoke
from store.audit import AuditStore
from store.authorities import AuthorityStore
from store.certificates import DeviceCertificateRow
from store.engine import Database
from tests.pki_setup import PASSPHRASE, RemoteKeyStore, new_key, now


@pytest.fixture
def keys(tmp_path: Path) -> FileKeyStore:
    return FileKeyStore(tmp_path / "ca", PASSPHRASE)


async def issue(
    db: Database, signer: CertificateSigner, device: str, generation: int, key: object
) -> DeviceCertificateRow:
    async with db.pool.connection() as connection:
        return await signer.issue_device(connection, device, generation, key.public_key(), "alice")  # type: ignore[attr-defined]


async def test_the_three_authorities_are_made_once_and_found_again(db: Database, keys: FileKeyStore) -> None:
    made = await ensure_authorities(db, keys, now(), "alice")
    again = await ensure_authorities(db, keys, now(), "bob")
    assert set(made) == set(AuthorityKind)
    assert {view.authority_id for view in made.values()} == {view.authority_id for view in again.values()}
    lines = await AuditStore(db).find(subject_kind="authority")
    assert {(line.actor, line.action, line.details["kind"]) for line in lines} == {
        ("alice", "authority.created", str(kind)) for kind in AuthorityKind
    }
    [crl] = await AuthorityStore(db).newest_crls()
    device = made[AuthorityKind.DEVICE]
    assert crl.authority_id == device.authority_id
    assert verify_crl(crl.pem, read_certificate(device.certificate), now()).serials == frozenset()


async def test_twenty_processes_that_make_the_authorities_at_once_make_one_of_each(
    db: Database, keys: FileKeyStore
) -> None:
    made = await asyncio.gather(*(ensure_authorities(db, keys, now(), f"process {n}") for n in range(20)))
    assert len({view.authority_id for views in made for view in views.values()}) == 3
    assert len(await AuthorityStore(db).find()) == 3


async def test_a_key_that_is_lost_is_found_out_when_the_stack_starts(
    db: Database, keys: FileKeyStore, tmp_path: Path
) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    with pytest.raises(NotFoundError, match="made on another machine, or is lost"):
        await ensure_authorities(db, FileKeyStore(tmp_path / "other", PASSPHRASE), now(), "alice")
    with pytest.raises(InvalidInputError, match="passphrase is not the one"):
        await ensure_authorities(db, FileKeyStore(tmp_path / "ca", b"another passphrase"), now(), "alice")


async def test_without_a_device_authority_the_error_says_how_to_make_one(db: Database, keys: FileKeyStore) -> None:
    with pytest.raises(NotFoundError, match=r"starter\.py ca init"):
        await AuthorityStore(db).active(AuthorityKind.DEVICE)
    with pytest.raises(NotFoundError, match=r"starter\.py ca init"):
        await issue(db, CertificateSigner(db, keys), "motor-1", 1, new_key())


async def test_a_certificate_is_written_in_the_transaction_of_whoever_asks(db: Database, keys: FileKeyStore) -> None:
    authorities = await ensure_authorities(db, keys, now(), "alice")
    row = await issue(db, CertificateSigner(db, keys, days=30), "motor-1", 1, new_key())
    certificate = x509.load_pem_x509_certificate(row.pem.encode())
    assert (certificate_id(certificate), serial_hex(certificate)) == (row.certificate_id, row.serial_hex)
    assert row.authority_id == authorities[AuthorityKind.DEVICE].authority_id
    assert timedelta(days=29) < row.not_after - datetime.now(UTC) <= timedelta(days=30)
    [line] = await AuditStore(db).find(subject="motor-1")
    assert (line.action, line.actor, line.details["generation"]) == ("certificate.issued", "alice", 1)


async def test_a_transaction_that_fails_leaves_no_certificate(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    key, signer = new_key(), CertificateSigner(db, keys)
    with pytest.raises(RefusedError, match="on purpose"):
        async with db.pool.connection() as connection:
            await signer.issue_device(connection, "motor-1", 1, key.public_key(), "alice")
            raise RefusedError("on purpose")
    assert (await issue(db, signer, "motor-2", 1, key)).device_id == "motor-2"


async def test_fifty_requests_with_one_key_get_one_certificate(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    key, signer = new_key(), CertificateSigner(db, keys)
    rows = await asyncio.gather(*(issue(db, signer, "motor-1", 1, key) for _ in range(50)))
    assert len({row.pem for row in rows}) == 1
    assert len(await AuditStore(db).find(subject="motor-1")) == 1


async def test_of_fifty_requests_with_fifty_keys_one_gets_the_certificate(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    signer = CertificateSigner(db, keys)
    rows = await asyncio.gather(
        *(issue(db, signer, "motor-1", 1, new_key()) for _ in range(50)), return_exceptions=True
    )
    assert sum(isinstance(row, DeviceCertificateRow) for row in rows) == 1
    assert sum(isinstance(row, ConflictError) for row in rows) == 49


async def test_without_the_constraint_many_certificates_of_one_generation_are_issued(
    db: Database, keys: FileKeyStore
) -> None:
    """The mutant: it is the database that decides, not the code before it."""
    await ensure_authorities(db, keys, now(), "alice")
    signer = CertificateSigner(db, keys)
    async with db.pool.connection() as connection:
        await connection.execute("DROP INDEX certificates_one_per_generation")
    try:
        rows = await asyncio.gather(*(issue(db, signer, "motor-1", 1, new_key()) for _ in range(10)))
        assert len({row.pem for row in rows}) == 10
    finally:
        async with db.pool.connection() as connection:
            await connection.execute("DELETE FROM certificates")
            await connection.execute(
                "CREATE UNIQUE INDEX certificates_one_per_generation ON certificates (device_id, generation)"
            )


async def test_a_key_of_one_device_is_no_key_of_another(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    key, signer = new_key(), CertificateSigner(db, keys)
    await issue(db, signer, "motor-1", 1, key)
    with pytest.raises(ConflictError, match="certificate 1 of motor-1 already"):
        await issue(db, signer, "motor-2", 1, key)
    with pytest.raises(ConflictError, match="no key has two"):
        await issue(db, signer, "motor-1", 2, key)


async def test_a_key_whose_certificate_was_revoked_does_not_come_back(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    key, signer = new_key(), CertificateSigner(db, keys)
    await issue(db, signer, "motor-1", 1, key)
    async with db.pool.connection() as connection:
        await revoke(connection, "motor-1", RevocationReason.KEY_COMPROMISE, "alice", "stolen")
    with pytest.raises(RefusedError, match="a key does not come back"):
        await issue(db, signer, "motor-1", 1, key)


async def test_a_signer_that_is_no_file_signs_everything(db: Database) -> None:
    remote = RemoteKeyStore()
    authorities = await ensure_authorities(db, remote, now(), "alice")
    row = await issue(db, CertificateSigner(db, remote), "motor-1", 1, new_key())
    device = authorities[AuthorityKind.DEVICE]
    assert device.key_reference.startswith("kms:")
    read_certificate(row.pem).verify_directly_issued_by(read_certificate(device.certificate))
    assert remote.keys[device.key_reference].signatures == 3  # its own certificate, the first list, the device's


async def test_a_key_store_that_gives_another_key_signs_nothing(db: Database) -> None:
    remote = RemoteKeyStore()
    authorities = await ensure_authorities(db, remote, now(), "alice")
    reference = authorities[AuthorityKind.DEVICE].key_reference
    remote.keys[reference] = remote.keys[authorities[AuthorityKind.CLAIM].key_reference]
    with pytest.raises(VerificationError, match="not this authority's"):
        await issue(db, CertificateSigner(db, remote), "motor-1", 1, new_key())
    async with db.pool.connection() as connection:
        row = await (await connection.execute("SELECT count(*) FROM certificates")).fetchone()
    assert row == (0,)


async def test_only_one_authority_of_a_kind_issues(db: Database, keys: FileKeyStore) -> None:
    await ensure_authorities(db, keys, now(), "alice")
    [view] = await AuthorityStore(db).trusted(AuthorityKind.DEVICE)
    assert view.state is AuthorityState.ACTIVE
    async with db.pool.connection() as connection:
        with pytest.raises(psycopg.errors.UniqueViolation):
            await connection.execute(
                "INSERT INTO authorities SELECT 'other', kind, name, certificate, key_reference, state, not_before, "
                "not_after, 0, now(), 'mallory', NULL FROM authorities WHERE kind = 'device'"
            )
