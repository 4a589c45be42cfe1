"""Signing with a CA's key: device certificates in a transaction of the caller's, and first and next revocation lists.

Needs a key store, so it runs where the keys are: in workers of the CA queue, in the command line, in the embedded stack.
Signing happens in threads: a hardware or cloud signer answers over a network.
"""

import asyncio
from datetime import UTC, datetime, timedelta

from cryptography import x509
from psycopg import AsyncConnection

from models.identity import MAX_CERTIFICATE_DAYS, AuthorityKind, AuthorityView
from pki.authority import Authority, certificate_id, pem_of, read_certificate, serial_hex
from pki.issue import issue_device
from pki.keys import DevicePublicKey, spki_sha256
from pki.revocation import Revoked, sign_crl, verify_crl
from pki.signer import KeyStore
from store.authorities import SignedCrl, active_authority
from store.certificates import (
    DeviceCertificateRow,
    NewCertificate,
    add_certificate,
    certificate_of_key,
    same_certificate,
)
from store.engine import Database

CRL_LIFETIME = timedelta(hours=168)
"""A week: nobody has to come on a weekend because the signer is down; the alarm is at half of it."""


class Issuers:
    """Opened authorities. Opening a key costs a passphrase's derivation or a signer's round trip; it is done once."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys
        self._opened: dict[str, Authority] = {}

    async def open(self, view: AuthorityView) -> Authority:
        """The authority with its key. Raises NotFoundError, InvalidInputError, VerificationError as the key store does."""
        found = self._opened.get(view.authority_id)
        if found is None:
            key = await asyncio.to_thread(self._keys.open, view.key_reference)
            found = self._opened[view.authority_id] = Authority(read_certificate(view.certificate), key)
        return found


class CertificateSigner:
    """Issues device certificates with the active device CA."""

    def __init__(self, db: Database, keys: KeyStore, *, days: int = MAX_CERTIFICATE_DAYS) -> None:
        self._db = db
        self._issuers = Issuers(keys)
        self._days = days

    async def issue_device(
        self, connection: AsyncConnection, device_id: str, generation: int, public_key: DevicePublicKey, actor: str
    ) -> DeviceCertificateRow:
        """A certificate, written in the caller's transaction. Idempotent by key, device and generation.

        Raises:
            ConflictError: the key has another certificate, or the generation has another key.
            RefusedError: the key's certificate was revoked, or the CA's life is over.
            NotFoundError: there is no device CA, or its key is not here.
        """
        known = await certificate_of_key(connection, spki_sha256(public_key))
        if known is not None:
            return same_certificate(known, device_id, generation)
        view = await active_authority(connection, AuthorityKind.DEVICE, hold=True)
        authority = await self._issuers.open(view)
        now = datetime.now(UTC)
        certificate = await asyncio.to_thread(issue_device, authority, public_key, device_id, now, self._days)
        return await add_certificate(connection, _row(certificate, view, device_id, generation, public_key), actor)


async def signed_crl(
    authority: Authority, number: int, revoked: list[Revoked], now: datetime, lifetime: timedelta
) -> SignedCrl:
    """A list that was read back and holds. A signer that signs rubbish is found out here, not at the broker."""

    def sign() -> SignedCrl:
        pem = sign_crl(authority, number, revoked, now, lifetime)
        return SignedCrl(pem, verify_crl(pem, authority.certificate, now))

    return await asyncio.to_thread(sign)


def _row(
    certificate: x509.Certificate,
    authority: AuthorityView,
    device_id: str,
    generation: int,
    public_key: DevicePublicKey,
) -> NewCertificate:
    return NewCertificate(
        certificate_id=certificate_id(certificate),
        device_id=device_id,
        authority_id=authority.authority_id,
        generation=generation,
        serial_hex=serial_hex(certificate),
        spki_sha256=spki_sha256(public_key),
        pem=pem_of(certificate),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )
