"""Certificate authorities: making one's certificate, and one with its key, as the issuing functions take it. No I/O.

There are three kinds, and no certificate of one is good for another (docs/adr/0012-three-certificate-authorities.md).
Each CA has a name that no other has, because revocation lists are found by their issuer's name.

>>> from datetime import UTC, datetime
>>> from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
>>> key = generate_private_key(SECP256R1())
>>> now = datetime.now(UTC)
>>> certificate = make_authority(AuthorityKind.DEVICE, authority_name(AuthorityKind.DEVICE), key, now, 3650)
>>> Authority(certificate, key).authority_id == certificate_id(certificate)
True
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from models.errors import InvalidInputError, VerificationError
from models.identity import AuthorityKind
from pki.keys import DevicePublicKey, IssuerPrivateKey, hash_for, public_der, spki_sha256

__all__ = [
    "BACKDATED",
    "Authority",
    "authority_name",
    "certificate_id",
    "make_authority",
    "pem_of",
    "read_certificate",
    "serial_hex",
    "spki_sha256",
]

BACKDATED = timedelta(hours=24)
"""Certificates begin so long before they are made: clocks of devices and brokers may be that far behind."""

AUTHORITY_DAYS = 3650
"""Ten years: the fleet outlives a CA, which is why there is roll-over, but not one every year."""


@dataclass(frozen=True)
class Authority:
    """A CA's certificate and the key that signs for it. Raises VerificationError when they do not belong together."""

    certificate: x509.Certificate
    key: IssuerPrivateKey

    def __post_init__(self) -> None:
        """A wrong key would sign certificates that nobody accepts, and nobody would know why."""
        if public_der(self.key.public_key()) != public_der(cast(DevicePublicKey, self.certificate.public_key())):
            raise VerificationError(
                f"cannot sign for {self.certificate.subject.rfc4514_string()}: the key store gave a key that is not "
                "this authority's; check its key reference with 'starter.py ca show'"
            )

    @property
    def authority_id(self) -> str:
        """Hex sha256 of the certificate."""
        return certificate_id(self.certificate)


def authority_name(kind: AuthorityKind) -> str:
    """A name for a new CA, as in `Tidegate device CA 5f03a9c1`."""
    return f"Tidegate {kind.value} CA {secrets.token_hex(4)}"


def make_authority(
    kind: AuthorityKind, name: str, key: IssuerPrivateKey, now: datetime, days: int = AUTHORITY_DAYS
) -> x509.Certificate:
    """A self-signed CA certificate that may sign end certificates and revocation lists, and no further CA.

    Args:
        name: common name, 1 to 64 characters; give no two CAs the same.
        days: from `now`; it begins `BACKDATED` before.
    """
    if not 0 < len(name) <= 64:
        raise InvalidInputError(f"cannot make a {kind.value} CA: expected a name of 1 to 64 characters, got {name!r}")
    if days < 1:
        raise InvalidInputError(f"cannot make a {kind.value} CA: expected a life of at least one day, got {days}")
    now = now.replace(microsecond=0)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public_key = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .sign(key, hash_for(key))
    )


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """keyCertSign and cRLSign for a CA, digitalSignature for all others."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def certificate_id(certificate: x509.Certificate) -> str:
    """Name of a certificate: hex sha256 of its DER."""
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def serial_hex(certificate: x509.Certificate) -> str:
    """The certificate's own serial number, in lower-case hex without leading zeros."""
    return format(certificate.serial_number, "x")


def pem_of(certificate: x509.Certificate) -> str:
    """PEM, with a newline at its end."""
    return certificate.public_bytes(Encoding.PEM).decode()


def read_certificate(pem: str | bytes) -> x509.Certificate:
    """Inverse of `pem_of`. Raises InvalidInputError."""
    try:
        return x509.load_pem_x509_certificate(pem.encode() if isinstance(pem, str) else pem)
    except ValueError as error:
        raise InvalidInputError(f"not a certificate in PEM: {error}") from error
