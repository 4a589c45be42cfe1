"""What `device enroll` does: plays a device at the enrolment server by hand.

The key is made first and kept, so that a request that is repeated is the same request.
"""

import base64
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from cli.claim import write_new
from models.errors import InvalidInputError, NotFoundError, RefusedError, StillWaitingError, UnavailableError
from models.ids import SERIAL_NUMBER
from pki.authority import pem_of
from pki.pkcs7 import read_certs_only

ENROLL = "/.well-known/est/simpleenroll"
REQUEST_SECONDS = 60.0


@dataclass(frozen=True)
class Enrolled:
    """What is in the directory now."""

    device_id: str
    expires: str
    key: Path
    certificate: Path
    ca: Path


def enroll(url: str, serial_number: str, claim: Path, out: Path, wait: float, say: Callable[[str], None]) -> Enrolled:
    """Enrol; asks again while the server says 202 or 503, for at most `wait` seconds.

    Args:
        claim: directory with claim.key, claim.pem and ca.pem ('claim create' writes it).
        out: gets key.pem, cert.pem, ca.pem and thing-name.

    Raises RefusedError with the server's sentence, StillWaitingError when the time is over.
    """
    if not SERIAL_NUMBER.fullmatch(serial_number):
        raise InvalidInputError(
            f"not a serial number: {serial_number[:80]!r}, expected 1 to 64 letters, digits and : . _ -"
        )
    if (out / "cert.pem").exists():
        raise InvalidInputError(f"cannot enrol into {out}: it has a cert.pem already; choose another directory")
    context = _context(claim)
    key = _key(out)
    certificate = _ask(url, context, _request(serial_number, key), wait, say)
    name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    device_id = name if isinstance(name, str) else name.decode()
    (out / "ca.pem").write_bytes((claim / "ca.pem").read_bytes())
    (out / "thing-name").write_text(f"{device_id}\n")
    write_new(out / "cert.pem", pem_of(certificate).encode())
    expires = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M}Z"
    return Enrolled(device_id, expires, out / "key.pem", out / "cert.pem", out / "ca.pem")


def _context(claim: Path) -> ssl.SSLContext:
    for name in ("claim.key", "claim.pem", "ca.pem"):
        if not (claim / name).is_file():
            raise NotFoundError(f"cannot enrol with {claim}: it has no {name}; 'claim create --out {claim}' writes it")
    try:
        context = ssl.create_default_context(cafile=str(claim / "ca.pem"))
        context.load_cert_chain(claim / "claim.pem", claim / "claim.key")
    except (OSError, ssl.SSLError) as error:
        raise InvalidInputError(f"cannot enrol with {claim}: {error}") from error
    return context


def _key(out: Path) -> EllipticCurvePrivateKey:
    """The device's key: the one that is there, else a new one."""
    path = out / "key.pem"
    if path.exists():
        found = load_pem_private_key(path.read_bytes(), None)
        if not isinstance(found, EllipticCurvePrivateKey):
            raise InvalidInputError(f"cannot enrol with {path}: expected an EC key")
        return found
    key = generate_private_key(SECP256R1())
    write_new(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), secret=True)
    return key


def _request(serial_number: str, key: EllipticCurvePrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.SERIAL_NUMBER, serial_number)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())
    return base64.b64encode(request.public_bytes(Encoding.DER))


def _ask(url: str, context: ssl.SSLContext, body: bytes, wait: float, say: Callable[[str], None]) -> x509.Certificate:
    deadline, said = time.monotonic() + wait, ""
    with httpx.Client(base_url=url, verify=context, timeout=REQUEST_SECONDS, trust_env=False) as http:
        while True:
            try:
                answer = http.post(ENROLL, content=body, headers={"Content-Type": "application/pkcs10"})
            except httpx.HTTPError as error:
                raise UnavailableError(
                    f"the enrolment server at {url} does not answer: {error}; start the stack with 'starter.py up', or "
                    "check TIDEGATE_ENROLMENT_URL"
                ) from error
            if answer.status_code == httpx.codes.OK:
                return read_certs_only(base64.b64decode(answer.content))[0]
            text = answer.text.strip()
            if answer.status_code not in (httpx.codes.ACCEPTED, httpx.codes.SERVICE_UNAVAILABLE):
                raise RefusedError(f"the enrolment server refused ({answer.status_code}): {text}")
            pause = min(float(answer.headers.get("Retry-After", "5")), 5.0)
            if time.monotonic() + pause > deadline:
                over = StillWaitingError if answer.status_code == httpx.codes.ACCEPTED else UnavailableError
                reason = text.removesuffix("; ask again")
                raise over(f"no certificate within {wait:.0f} s: {reason}; the same command goes on asking")
            if text != said:
                say(text)
            said = text
            time.sleep(pause)
