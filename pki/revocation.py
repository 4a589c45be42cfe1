"""Revocation lists: signing one, and checking one before anybody relies on it. No I/O, no clock.

A list is a third layer: the first is the registry, whose word the gateway takes for every message (store/access.py), the
second the broker's access list. It is also what can fail closed at the wrong time: OpenSSL refuses **every** device
when a list is missing, over, or of another CA. So nothing installs a list that `verify_crl` has not passed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from models.errors import VerificationError
from models.identity import RevocationReason
from pki.authority import Authority
from pki.keys import DevicePublicKey, hash_for

BACKDATED = timedelta(minutes=5)
"""A broker's clock may be so far behind. At most a hundredth of the list's life, which the alarm at half of it counts."""


@dataclass(frozen=True, slots=True)
class Revoked:
    """A certificate that was revoked: its own serial number in hex, when, why."""

    serial_hex: str
    at: datetime
    reason: RevocationReason = RevocationReason.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class CrlFacts:
    """What a list that holds says."""

    number: int
    this_update: datetime
    next_update: datetime
    serials: frozenset[str]

    @property
    def half_life(self) -> datetime:
        """From then on, less than half of its life is left: an alarm."""
        return self.this_update + (self.next_update - self.this_update) / 2


def why_due(newest: CrlFacts | None, revoked: frozenset[str], now: datetime, lifetime: timedelta) -> str | None:
    """Why a new list has to be signed; None where the newest one is good.

    Args:
        newest: the newest list as `verify_crl` passed it; None where there is none that holds.
        revoked: what a new list would name. What the newest one names beyond that has ended by itself, and is no reason.
    """
    if newest is None:
        return "there is no list that holds"
    missing = len(revoked - newest.serials)
    if missing:
        return f"{missing} certificate{'s' if missing > 1 else ''} revoked since list {newest.number}"
    if now >= newest.this_update + lifetime / 4:
        return f"a quarter of the life of list {newest.number} is over"
    if newest.next_update - now > lifetime:
        return f"list {newest.number} lives longer than {lifetime}"
    return None


def sign_crl(
    authority: Authority, number: int, revoked: Sequence[Revoked], now: datetime, lifetime: timedelta
) -> bytes:
    """A list as PEM. Numbers of one CA grow and never repeat."""
    now = now.replace(microsecond=0)
    ca = authority.certificate
    issuer_key = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    entries = [_entry(one) for one in sorted(revoked, key=lambda one: one.serial_hex)]
    builder = (
        # All entries at once: to add them one by one takes 8 s for 100,000.
        x509.CertificateRevocationListBuilder(revoked_certificates=entries)
        .issuer_name(ca.subject)
        .last_update(now - min(BACKDATED, lifetime / 100))
        .next_update(now + lifetime)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
    )
    return builder.sign(authority.key, hash_for(authority.key)).public_bytes(Encoding.PEM)


def verify_crl(pem: bytes | str, authority: x509.Certificate, now: datetime) -> CrlFacts:
    """What the list says, when it can be relied upon.

    Raises VerificationError: not one whole list in PEM, of another CA, not signed by it, over, not begun, without a
    number, or a list of changes only.
    """
    data = pem.encode() if isinstance(pem, str) else pem
    name = authority.subject.rfc4514_string()
    crl = _parse(data, name)
    if crl.issuer != authority.subject:
        raise VerificationError(f"revocation list of {name}: it is one of {crl.issuer.rfc4514_string()}")
    try:
        signed = _signed_by(crl, authority)
        extensions = list(crl.extensions)
        numbers = [item.value.crl_number for item in extensions if isinstance(item.value, x509.CRLNumber)]
        serials = frozenset(format(entry.serial_number, "x") for entry in crl)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        raise VerificationError(f"revocation list of {name}: it cannot be read: {error}") from error
    if not signed:
        raise VerificationError(f"revocation list of {name}: its signature does not hold")
    if any(item.critical or isinstance(item.value, x509.DeltaCRLIndicator) for item in extensions) or not numbers:
        raise VerificationError(
            f"revocation list of {name}: expected a full list with a number, this is something else"
        )
    if crl.next_update_utc is None or crl.next_update_utc <= now:
        raise VerificationError(f"revocation list {numbers[0]} of {name}: it has ended at {crl.next_update_utc}")
    if crl.last_update_utc > now + BACKDATED:
        raise VerificationError(
            f"revocation list {numbers[0]} of {name}: it begins at {crl.last_update_utc}, and this clock says {now}; "
            "check the clock"
        )
    return CrlFacts(numbers[0], crl.last_update_utc, crl.next_update_utc, serials)


def _parse(data: bytes, name: str) -> x509.CertificateRevocationList:
    whole = data.strip()
    begin, end = b"-----BEGIN X509 CRL-----", b"-----END X509 CRL-----"
    if not whole.startswith(begin) or not whole.endswith(end) or whole.count(b"-----BEGIN") != 1:
        found = "nothing" if not whole else f"{len(data)} bytes of something else, or only a part"
        raise VerificationError(f"revocation list of {name}: expected one whole list in PEM, got {found}")
    try:
        return x509.load_pem_x509_crl(whole)
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise VerificationError(f"revocation list of {name}: it cannot be read: {error}") from error


def _signed_by(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    return crl.is_signature_valid(cast(DevicePublicKey, authority.public_key()))


def _entry(revoked: Revoked) -> x509.RevokedCertificate:
    builder = (
        x509.RevokedCertificateBuilder()
        .serial_number(int(revoked.serial_hex, 16))
        .revocation_date(revoked.at.replace(microsecond=0))
    )
    if revoked.reason is not RevocationReason.UNSPECIFIED:  # RFC 5280, 5.3.1: then the extension is left out
        builder = builder.add_extension(x509.CRLReason(x509.ReasonFlags(revoked.reason.value)), critical=False)
    return builder.build()
