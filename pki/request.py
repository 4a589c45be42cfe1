"""Certificate requests (PKCS#10, RFC 2986), read as hostile input. No I/O.

**Only the public key of a request is ever used**, and the serial number that it claims, which others check. Subject,
extensions, usages, validity: whatever a request says of those, the certificate is made from our own template
(pki/issue.py). So a request may say a lot that is not refused and has no effect; what is refused is what cannot be
read, what nobody proved to have the key of, and what asks to be an authority.
"""

import base64
import binascii
import re
import warnings
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512
from cryptography.x509.oid import NameOID, SignatureAlgorithmOID

from models.errors import InvalidInputError
from models.ids import CLAIM_PREFIX, ENGINE_PREFIX, SERIAL_NUMBER
from pki.keys import DevicePublicKey, check_public_key, spki_sha256

MAX_REQUEST_BYTES = 8192
"""A request with an RSA-4096 key has 1.7 kB; PEM and base64 add a third."""

_PEM = re.compile(
    rb"\s*-----BEGIN (NEW )?CERTIFICATE REQUEST-----\s(.*?)-----END (NEW )?CERTIFICATE REQUEST-----\s*", re.DOTALL
)
_SIGNATURES = {
    SignatureAlgorithmOID.ECDSA_WITH_SHA256,
    SignatureAlgorithmOID.ECDSA_WITH_SHA384,
    SignatureAlgorithmOID.ECDSA_WITH_SHA512,
    SignatureAlgorithmOID.RSA_WITH_SHA256,
    SignatureAlgorithmOID.RSA_WITH_SHA384,
    SignatureAlgorithmOID.RSA_WITH_SHA512,
    SignatureAlgorithmOID.RSASSA_PSS,
    SignatureAlgorithmOID.ED25519,
}
_REFUSED_BY_LIBRARY = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True)
class CertificateRequest:
    """What is used of a request."""

    public_key: DevicePublicKey
    spki_sha256: str
    serial_number: str
    """The subject's serialNumber, else its common name: what the device says it is, and no more than that."""


def read_request(data: bytes, *, max_bytes: int = MAX_REQUEST_BYTES) -> CertificateRequest:
    """Read a request: base64 of DER (the body of EST, RFC 8951), PEM, or DER.

    Raises InvalidInputError whose message says why, fit to be sent back.
    """
    if len(data) > max_bytes:
        raise InvalidInputError(f"certificate request refused: {len(data)} bytes, expected at most {max_bytes}")
    request = _parse(_der(data))
    key = _key(request)
    _check_signature(request)
    _refuse_authority(request)
    return CertificateRequest(key, spki_sha256(key), _serial_number(request))


def _der(data: bytes) -> bytes:
    if not data.strip():
        raise InvalidInputError("certificate request refused: it is empty, expected PKCS#10 as base64, PEM or DER")
    if data[:1] == b"\x30":
        return data
    match = _PEM.fullmatch(data)
    if match is None and b"-----BEGIN" in data:
        raise InvalidInputError(
            "certificate request refused: expected one PEM block 'CERTIFICATE REQUEST' and nothing else"
        )
    try:
        return base64.b64decode(b"".join((match[2] if match else data).split()), validate=True)
    except binascii.Error as error:
        raise InvalidInputError(
            f"certificate request refused: neither DER nor PEM nor base64: {error}; expected PKCS#10"
        ) from error


def _parse(der: bytes) -> x509.CertificateSigningRequest:
    try:
        return x509.load_der_x509_csr(der)
    except _REFUSED_BY_LIBRARY as error:
        raise InvalidInputError(f"certificate request refused: not PKCS#10: {_said(error)}") from error


def _key(request: x509.CertificateSigningRequest) -> DevicePublicKey:
    """Before the signature is checked: verifying with a key of any size is work that a stranger could order."""
    try:
        return check_public_key(request.public_key())
    except _REFUSED_BY_LIBRARY as error:
        raise InvalidInputError(f"certificate request refused: its key cannot be read: {_said(error)}") from error
    except InvalidInputError as error:
        raise InvalidInputError(f"certificate request refused: {error}") from error


def _check_signature(request: x509.CertificateSigningRequest) -> None:
    """Proof of possession: whoever made the request has the private key."""
    try:
        hashed = request.signature_hash_algorithm
        strong = hashed is None or isinstance(hashed, SHA256 | SHA384 | SHA512)
        if not strong or request.signature_algorithm_oid not in _SIGNATURES:
            name = hashed.name if hashed is not None else request.signature_algorithm_oid.dotted_string
            raise InvalidInputError(
                f"certificate request refused: signed with {name}; expected SHA-256, SHA-384, SHA-512 or Ed25519"
            )
        valid = request.is_signature_valid
    except _REFUSED_BY_LIBRARY as error:
        raise InvalidInputError(f"certificate request refused: its signature is unreadable: {_said(error)}") from error
    if not valid:
        raise InvalidInputError(
            "certificate request refused: its signature does not hold for its key; sign it with the key it is about"
        )


def _refuse_authority(request: x509.CertificateSigningRequest) -> None:
    """Nothing it asks for would be granted; one that asks to be a CA is told so rather than ignored."""
    try:
        asked = [extension.value for extension in request.extensions]
    except _REFUSED_BY_LIBRARY as error:
        raise InvalidInputError(
            f"certificate request refused: the extensions it asks for are unreadable: {_said(error)}"
        ) from error
    for value in asked:
        if isinstance(value, x509.BasicConstraints) and value.ca:
            raise InvalidInputError("certificate request refused: it asks to be a certificate authority (CA:TRUE)")
        if isinstance(value, x509.KeyUsage) and (value.key_cert_sign or value.crl_sign):
            raise InvalidInputError("certificate request refused: it asks to sign certificates (keyCertSign, cRLSign)")


def _serial_number(request: x509.CertificateSigningRequest) -> str:
    try:
        with warnings.catch_warnings():  # ignore, never error: what races with another thread may last
            warnings.filterwarnings("ignore", "Attribute's length")
            subject = request.subject
    except _REFUSED_BY_LIBRARY as error:
        raise InvalidInputError(f"certificate request refused: its subject is unreadable: {_said(error)}") from error
    found = subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER) or subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(found) != 1:
        raise InvalidInputError(
            "certificate request refused: expected the device's serial number once, as the subject's serialNumber or "
            f"else as its common name; found it {len(found)} times"
        )
    value = found[0].value
    if not isinstance(value, str) or not SERIAL_NUMBER.fullmatch(value):
        raise InvalidInputError(
            f"certificate request refused: {value[:80]!r} is not a serial number; expected 1 to 64 letters, digits "
            "and : . _ -, beginning with a letter or digit"
        )
    if value.lower().startswith((ENGINE_PREFIX, CLAIM_PREFIX)):
        raise InvalidInputError(f"certificate request refused: the serial number {value!r} is reserved")
    return value


def _said(error: Exception) -> str:
    """A library's words, short enough to be sent back."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
