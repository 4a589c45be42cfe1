"""Certificates in the only form that EST (RFC 7030) gives them out in: a PKCS#7 without signers. No I/O."""

from collections.abc import Sequence

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.hazmat.primitives.serialization.pkcs7 import load_der_pkcs7_certificates, serialize_certificates

from models.errors import InvalidInputError


def certs_only(certificates: Sequence[x509.Certificate]) -> bytes:
    """DER of a certs-only SignedData (RFC 5272, section 4.1), in no particular order."""
    return serialize_certificates(list(certificates), Encoding.DER)


def read_certs_only(der: bytes) -> list[x509.Certificate]:
    """Inverse of `certs_only`. Raises InvalidInputError."""
    try:
        return load_der_pkcs7_certificates(der)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInputError(f"not certificates in PKCS#7: {error}") from error
