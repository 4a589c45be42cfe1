"""Device certificates in PostgreSQL: writing one, and finding it by its key. Revoking is store/access.py's.

Two constraints decide everything: no key has two certificates, ever (a key that was revoked does not come back), and no
device has two of one generation. So the same request twice, or two workers with one request, end with one certificate.
"""

from datetime import datetime

from psycopg import AsyncConnection
from psycopg.rows import class_row

from models.errors import ConflictError, RefusedError
from models.identity import CertificateView
from store.audit import append_audit

_COLUMNS = """
certificate_id, device_id, authority_id, generation, serial_hex, spki_sha256, pem, not_before, not_after, state,
issued_at, confirmed_at, revoked_at, revocation_reason
"""

_INSERT = f"""
INSERT INTO certificates (certificate_id, device_id, authority_id, generation, serial_hex, spki_sha256, pem, not_before,
                          not_after, state)
VALUES (%(certificate_id)s, %(device_id)s, %(authority_id)s, %(generation)s, %(serial_hex)s, %(spki_sha256)s, %(pem)s,
        %(not_before)s, %(not_after)s, 'valid')
ON CONFLICT DO NOTHING RETURNING {_COLUMNS}
"""


class DeviceCertificateRow(CertificateView):
    """A certificate with its PEM."""

    pem: str


class NewCertificate(DeviceCertificateRow):
    """One that was signed and is not known yet."""

    state: str = "valid"
    issued_at: datetime = datetime.min


async def certificate_of_key(connection: AsyncConnection, spki_sha256: str) -> DeviceCertificateRow | None:
    """The certificate that this key has or had, whatever became of it."""
    async with connection.cursor(row_factory=class_row(DeviceCertificateRow)) as cursor:
        await cursor.execute(f"SELECT {_COLUMNS} FROM certificates WHERE spki_sha256 = %s".encode(), (spki_sha256,))
        return await cursor.fetchone()


async def add_certificate(connection: AsyncConnection, new: NewCertificate, actor: str) -> DeviceCertificateRow:
    """Record a certificate, and who had it issued. Where the key has one of this device and generation, that one.

    Raises ConflictError, RefusedError as `same_certificate`; ConflictError where the generation has another key.
    """
    async with connection.cursor(row_factory=class_row(DeviceCertificateRow)) as cursor:
        await cursor.execute(_INSERT.encode(), new.model_dump())
        added = await cursor.fetchone()
    if added is None:
        known = await certificate_of_key(connection, new.spki_sha256)
        if known is None:
            raise ConflictError(
                f"cannot issue certificate {new.generation} of {new.device_id}: there is one of this generation, for "
                "another key; ask for the next generation"
            )
        return same_certificate(known, new.device_id, new.generation)
    details = {
        "certificate_id": added.certificate_id,
        "authority_id": added.authority_id,
        "generation": added.generation,
        "not_after": added.not_after.isoformat(),
    }
    await append_audit(connection, actor, "certificate.issued", "device", added.device_id, "", details)
    return added


def same_certificate(known: DeviceCertificateRow, device_id: str, generation: int) -> DeviceCertificateRow:
    """What a key has already, when it is what is asked for.

    Raises ConflictError where it is another device's or of another generation, RefusedError where it was revoked.
    """
    if (known.device_id, known.generation) != (device_id, generation):
        raise ConflictError(
            f"cannot issue certificate {generation} of {device_id}: its key has certificate {known.generation} of "
            f"{known.device_id} already, and no key has two; make a new key"
        )
    if known.state == "revoked":
        raise RefusedError(
            f"cannot issue certificate {generation} of {device_id}: its key's certificate was revoked at "
            f"{known.revoked_at}, and a key does not come back; make a new key"
        )
    return known
