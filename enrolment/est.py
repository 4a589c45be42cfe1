"""EST on the wire (RFC 7030, clarified by RFC 8951): content types, base64, and answers. No decision, no I/O but a body.

What comes is base64 of DER; bare DER and PEM are taken, too. What goes out is base64 in lines, with the header
`Content-Transfer-Encoding` that RFC 8951 makes superfluous and that older clients want. Refusals are text/plain, one
sentence.
"""

import asyncio
import base64

from cryptography import x509
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from models.errors import InvalidInputError
from pki.pkcs7 import certs_only
from pki.request import MAX_REQUEST_BYTES

PKCS10 = "application/pkcs10"
PKCS7 = "application/pkcs7-mime"
PKCS7_CERTS = f"{PKCS7}; smime-type=certs-only"
BODY_SECONDS = 20.0
"""A modem sends two kilobytes in much less."""


async def read_body(request: Request) -> bytes:
    """The request's body, never more of it than is allowed. Raises InvalidInputError."""
    given = request.headers.get("content-type", PKCS10).partition(";")[0].strip().lower()
    if given != PKCS10:
        raise InvalidInputError(f"expected Content-Type {PKCS10}, got {given[:60]!r}")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _bounded(request)
    except TimeoutError as error:
        raise InvalidInputError(f"the request's body did not come within {BODY_SECONDS:.0f} s") from error


async def _bounded(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_REQUEST_BYTES:
            raise InvalidInputError(
                f"certificate request refused: expected at most {MAX_REQUEST_BYTES} bytes, got more"
            )
    return body


def certificates(found: list[x509.Certificate], *, media_type: str = PKCS7_CERTS) -> Response:
    """200 with certificates in PKCS#7."""
    return Response(
        base64.encodebytes(certs_only(found)),
        headers={"Content-Type": media_type, "Content-Transfer-Encoding": "base64"},
    )


def issued(pem: str) -> Response:
    """200 with the certificate of whoever asked."""
    return certificates([x509.load_pem_x509_certificate(pem.encode())])


def later(seconds: int, reason: str) -> Response:
    """202: ask again."""
    return PlainTextResponse(f"{reason}\n", status_code=202, headers={"Retry-After": str(seconds)})


def refused(status: int, reason: str) -> Response:
    """A sentence."""
    return PlainTextResponse(f"{reason}\n", status_code=status)


def unavailable(reason: str, seconds: int = 5) -> Response:
    """503: nothing is wrong with the request."""
    return PlainTextResponse(f"{reason}\n", status_code=503, headers={"Retry-After": str(seconds)})
