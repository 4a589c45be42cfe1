"""TLS of the enrolment server: client certificates are optional, and the one that came reaches the application.

OpenSSL checks that a client certificate was issued by one of our claim or device CAs and that the client has its key. Its
dates are not checked there but by the application (store/enrolments, store/peers), which answers with a sentence where a
handshake would just end. Sessions are not resumed: each connection proves possession of the key anew.

uvicorn gives an application no client certificate; `PeerCertificateProtocol` puts it (DER) into the request's state.
"""

import ssl
from asyncio import TimerHandle, Transport
from collections.abc import Iterable
from pathlib import Path

from uvicorn.protocols.http.h11_impl import H11Protocol

from models.errors import InvalidInputError

_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which Python has no name for."""

PEER = "peer_certificate"
HEAD_SECONDS = 10.0
"""From the handshake, or the answer before, until a request's head is there. A body has a limit of its own (est.py)."""


def server_context(certificate: Path, private_key: Path) -> ssl.SSLContext:
    """The server's side, trusting nobody yet. Raises InvalidInputError for files that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, private_key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidInputError(
            f"cannot use {certificate} with the key {private_key}: {error}; check TIDEGATE_ENROLMENT_CERTIFICATE and "
            "TIDEGATE_ENROLMENT_PRIVATE_KEY"
        ) from error
    context.verify_mode = ssl.CERT_OPTIONAL
    context.verify_flags = ssl.VerifyFlags(context.verify_flags | _NO_CHECK_TIME)
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def trust(context: ssl.SSLContext, authorities: Iterable[str]) -> None:
    """Believe these CAs (PEM) too, from the next connection on. None can be taken away: the application asks again."""
    for pem in authorities:
        context.load_verify_locations(cadata=pem)


class PeerCertificateProtocol(H11Protocol):
    """HTTP/1.1 with `request.state.peer_certificate`: DER, or None where the client has shown no certificate.

    A connection on which no request comes is ended: uvicorn waits for the first head, and for the rest of any, for ever,
    and whoever holds MAX_CONNECTIONS of them, which takes no certificate, would keep every device out.
    """

    _limit: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """The handshake is over."""
        connection = transport.get_extra_info("ssl_object")
        peer = None if connection is None else connection.getpeercert(binary_form=True)
        self.app_state = {**self.app_state, PEER: peer}
        super().connection_made(transport)
        self._limit_wait()

    def data_received(self, data: bytes) -> None:
        """Something came: a request's head is whole by now, or goes on being waited for."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._end_wait()

    def on_response_complete(self) -> None:
        """The next request is waited for, unless it has come already; what is left of this one's body is none."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._limit_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Over."""
        self._end_wait()
        super().connection_lost(exc)

    def _limit_wait(self) -> None:
        self._end_wait()
        self._limit = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def _end_wait(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
