"""The device's side of enrolment: EST (RFC 7030) over HTTPS, and the word that a new certificate works.

The server's certificate is checked against what the device trusts (trust.py); who the device is, the TLS handshake
says: the claim certificate for the first request, the device's own ever after. Every request may be repeated: the same
key gets the same certificate.

```python
server = EnrolmentServer("https://enrol.example:8443", Trust(Path("ca.pem")))
thing = await enrol_for_good(credentials, server, claim, "SN-000123")
```
"""

import asyncio
import base64
import binascii
import contextlib
import random
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import pkcs7

from agent.credentials import Credentials, Pair, Standing, make_request
from agent.errors import CredentialError, EnrolmentAwayError, EnrolmentError, EnrolmentRefusedError, WipedError
from agent.trust import Trust
from models.errors import InvalidInputError

EST = "/.well-known/est"
CONFIRM = "/.well-known/tidegate/confirm"
MAX_ANSWER_BYTES = 64 * 1024
MAX_CERTIFICATES = 16
MAX_RETRY_SECONDS = 3600.0
FIRST = "enrolment"
"""The cause of a device's first certificate."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The certificate that a batch of devices was made with. It opens the door to enrolment and to nothing else."""

    certificate: Path
    private_key: Path


@dataclass(frozen=True, slots=True)
class EnrolmentPatience:
    """How long a request may take, and how the next one is spread. `refused`: after a clear no, which a person may change."""

    answer_seconds: float = 30.0
    retry_seconds: float = 2.0
    retry_most_seconds: float = 300.0
    refused_seconds: float = 900.0


class Enroller(Protocol):
    """What a device needs of the enrolment server. All of it raises EnrolmentError."""

    @property
    def patience(self) -> EnrolmentPatience:
        """How its requests are spread."""

    async def enroll(self, claim: Claim, request: bytes) -> list[x509.Certificate]:
        """A first certificate."""

    async def reenroll(self, pair: Pair, request: bytes) -> list[x509.Certificate]:
        """Another one, as the device that `pair` says."""

    async def confirm(self, pair: Pair) -> None:
        """Say that the broker has been reached with `pair`."""

    async def authorities(self) -> list[x509.Certificate]:
        """The CAs that the server vouches for."""


class EnrolmentServer:
    """An enrolment server at an https address; `trust` is what its certificate is checked against.

    `at_once`: requests that one process of many devices has under way at the same time.
    """

    def __init__(
        self, url: str, trust: Trust, patience: EnrolmentPatience | None = None, at_once: int | None = None
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise InvalidInputError(f"not an enrolment server's address: {url!r}, expected https://host:port")
        self.url = url.rstrip("/")
        self._patience = patience or EnrolmentPatience()
        self._trust = trust
        self._places = asyncio.Semaphore(at_once) if at_once else contextlib.nullcontext()

    def believed_by(self, trust: Trust) -> "EnrolmentServer":
        """The same server as another device of this process sees it."""
        other = EnrolmentServer(self.url, trust, self._patience)
        other._places = self._places
        return other

    @property
    def patience(self) -> EnrolmentPatience:
        return self._patience

    async def authorities(self) -> list[x509.Certificate]:
        """EST `cacerts`: the CAs that the server vouches for."""
        return _certificates(await self._send("GET", f"{EST}/cacerts", None))

    async def enroll(self, claim: Claim, request: bytes) -> list[x509.Certificate]:
        """EST `simpleenroll`, with the claim certificate. `request`: PKCS#10, DER."""
        files = (claim.certificate, claim.private_key)
        return _certificates(await self._send("POST", f"{EST}/simpleenroll", files, request))

    async def reenroll(self, pair: Pair, request: bytes) -> list[x509.Certificate]:
        """EST `simplereenroll`, with a certificate that is still valid."""
        files = (pair.certificate, pair.private_key)
        return _certificates(await self._send("POST", f"{EST}/simplereenroll", files, request))

    async def confirm(self, pair: Pair) -> None:
        """Prove possession of `pair` by the handshake, once the broker has been reached with it."""
        await self._send("POST", CONFIRM, (pair.certificate, pair.private_key))

    async def _send(self, method: str, path: str, files: tuple[Path, Path] | None, request: bytes = b"") -> bytes:
        """One exchange; the body of a 200 or 204."""
        what = f"{method} {self.url}{path}"
        headers = {"Content-Type": "application/pkcs10", "Content-Transfer-Encoding": "base64"} if request else {}
        context = self._context(files)
        try:
            async with self._places, asyncio.timeout(self.patience.answer_seconds):
                async with httpx.AsyncClient(verify=context, timeout=None, trust_env=False) as http:
                    async with http.stream(
                        method, self.url + path, content=base64.b64encode(request), headers=headers
                    ) as answer:
                        body = await _bounded(answer)
        except TimeoutError as error:
            raise EnrolmentAwayError(f"{what}: no answer within {self.patience.answer_seconds:g} s") from error
        except (httpx.HTTPError, ssl.SSLError, OSError) as error:
            raise EnrolmentAwayError(f"{what}: {type(error).__name__}: {error}") from error
        if answer.status_code in (httpx.codes.OK, httpx.codes.NO_CONTENT):
            return body
        reason = body.decode("utf-8", "replace").strip()
        if answer.status_code == httpx.codes.ACCEPTED or answer.status_code >= 500 or answer.status_code == 429:
            raise EnrolmentAwayError(f"{what}: {answer.status_code} {reason:.200}", _retry_after(answer))
        raise EnrolmentRefusedError(what, answer.status_code, reason)

    def _context(self, files: tuple[Path, Path] | None) -> ssl.SSLContext:
        context = self._trust.context()
        try:
            if files is not None:
                context.load_cert_chain(*files)
        except OSError as error:
            raise CredentialError(f"cannot use {' and '.join(map(str, files or ()))}: {error}") from error
        return context


async def enrol_for_good(credentials: Credentials, server: Enroller, claim: Claim, serial_number: str) -> str:
    """`enrol`, and again after a no or an answer that cannot be used: a person may allow it meanwhile."""
    while True:
        try:
            return await enrol(credentials, server, claim, serial_number)
        except EnrolmentError as error:
            seconds = server.patience.refused_seconds
            print(f"{serial_number}: {error}; trying again in about {seconds:g} s", file=sys.stderr, flush=True)
            await asyncio.sleep(seconds * random.uniform(0.5, 1.5))


async def enrol(credentials: Credentials, server: Enroller, claim: Claim, serial_number: str) -> str:
    """Get the device its first certificate, however long it takes; its thing name.

    A device that has one keeps it. A cut at any moment is made good by calling this again: the key is the same.

    Raises:
        WipedError: its credentials were wiped by command.
        CredentialError: the claim's files cannot be used.
        EnrolmentError: the server's clear no, or an answer that is of no use.
    """
    if credentials.record.standing is Standing.WIPED:
        raise WipedError("this device was wiped; it enrols again only when told to (--enrol-again)")
    if credentials.record.current is not None:
        return credentials.thing_name
    failures = 0
    while not credentials.record.next_ready:
        request = make_request(credentials.prepare(FIRST), serial_number)
        try:
            certificates = await server.enroll(claim, request)
        except EnrolmentAwayError as error:
            await asyncio.sleep(pause(server.patience, failures, error.retry_after_seconds))
            failures += 1
            continue
        try:
            credentials.keep(certificates)
        except CredentialError as error:
            raise EnrolmentError(f"cannot use the server's answer: {error}") from error
    credentials.promote()
    return credentials.thing_name


def pause(patience: EnrolmentPatience, failures: int, wanted: float | None) -> float:
    """Seconds until the next try: what the server asked for, or doubled each time; always spread."""
    most = min(patience.retry_most_seconds, patience.retry_seconds * 2.0 ** min(failures, 16))
    if wanted is not None:
        return wanted * random.uniform(1.0, 1.3)
    return most * random.uniform(0.5, 1.5)


def _retry_after(answer: httpx.Response) -> float | None:
    text = answer.headers.get("retry-after", "")
    return min(MAX_RETRY_SECONDS, max(0.2, float(text))) if text.isascii() and text.isdecimal() else None


async def _bounded(answer: httpx.Response) -> bytes:
    body = b""
    async for chunk in answer.aiter_bytes():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise EnrolmentError(f"{answer.url}: the answer is larger than {MAX_ANSWER_BYTES} bytes")
    return body


def _certificates(body: bytes) -> list[x509.Certificate]:
    """The certificates of a certs-only PKCS#7 in base64 (RFC 7030, section 4.1.3)."""
    try:
        found: Sequence[x509.Certificate] = pkcs7.load_der_pkcs7_certificates(base64.b64decode(body))
    except (ValueError, binascii.Error, UnsupportedAlgorithm) as error:
        raise EnrolmentError(f"cannot read the server's answer of {len(body)} bytes: {error}") from error
    if not 1 <= len(found) <= MAX_CERTIFICATES:
        raise EnrolmentError(f"the server's answer holds {len(found)} certificates, expected 1 to {MAX_CERTIFICATES}")
    return list(found)
