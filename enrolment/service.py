"""The enrolment server's requests: who asks, with which certificate, and what is answered.

| request | certificate | |
|---|---|---|
| `GET /.well-known/est/cacerts` | none | the CAs of our servers and of devices |
| `POST /.well-known/est/simpleenroll` | claim | a first certificate; starts or joins `provision:<serial>` |
| `POST /.well-known/est/simplereenroll` | device | the next certificate, for a new key |
| `POST /.well-known/tidegate/confirm` | device | "I have it, and it works" |

Everything that is decided is decided in PostgreSQL (store/) or by the workflow. A request is held a while for its
certificate, then answered with 202, and joins when it comes again.
"""

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import psycopg
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from prometheus_client import Counter, Histogram
from psycopg_pool import PoolTimeout
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from temporalio.client import Client, WorkflowFailureError
from temporalio.service import RPCError

from enrolment import est
from enrolment.tls import PEER
from enrolment.trust import Trust
from enrolment.waiting import Changes
from models.errors import InvalidInputError, RefusedError
from models.identity import EnrolmentState, ProvisionDeviceInput, ReissueCertificateInput
from pki.request import CertificateRequest, read_request
from store.enrolments import EnrolmentAnswer, EnrolmentRequest, EnrolmentStore
from store.peers import DevicePeer, PeerStore
from workflows.client import start_provisioning, start_reissue

REQUESTS = Counter("tidegate_enrolment_requests_total", "Requests by what was answered.", ["request", "status"])
SECONDS = Histogram(
    "tidegate_enrolment_request_seconds",
    "How long requests took, waiting for their certificate included.",
    ["request"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)

ASK_AGAIN_SECONDS = 2
"""Retry-After while a certificate is made."""

ASK_PERSON_AGAIN_SECONDS = 30
"""Retry-After while a person is waited for."""

LOOK_SECONDS = 1.0
"""How long a lost notification goes unnoticed."""

RESTART_SECONDS = 2.0
"""A run for the same serial number that is just ending would be joined for nothing; then another is started."""

log = structlog.get_logger("enrolment")

Answer = Callable[[Request], Awaitable[Response]]


class _NotAllowed(RefusedError):
    """The certificate that came, or that none came, does not allow this request."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class EnrolmentService:
    """Collaborators, and how long a request is held. `renewed` is told of each device that got a further certificate."""

    enrolments: EnrolmentStore
    peers: PeerStore
    client: Client
    changes: Changes
    trust: Trust
    wait_seconds: float = 10.0
    renewed: Callable[[str], Awaitable[None]] | None = None

    def application(self) -> Starlette:
        """The routes."""
        return Starlette(
            routes=[
                Route("/.well-known/est/cacerts", self._guarded("cacerts", self.cacerts), methods=["GET"]),
                Route("/.well-known/est/simpleenroll", self._guarded("simpleenroll", self.enroll), methods=["POST"]),
                Route(
                    "/.well-known/est/simplereenroll", self._guarded("simplereenroll", self.reenroll), methods=["POST"]
                ),
                Route("/.well-known/tidegate/confirm", self._guarded("confirm", self.confirm), methods=["POST"]),
            ]
        )

    # --- requests ----------------------------------------------------------------------------------------------------

    async def cacerts(self, _request: Request) -> Response:
        """What devices need to check our servers with, and to know their own certificates by."""
        return est.certificates(self.trust.given_out, media_type=est.PKCS7)

    async def enroll(self, request: Request) -> Response:
        """A first certificate, for a claim certificate and a key."""
        certificate_id = self._shown(request)
        if await self.peers.device(certificate_id) is not None:
            raise _NotAllowed(403, "a device certificate does not enrol; use simplereenroll for the next certificate")
        asked = read_request(await est.read_body(request))
        wanted = EnrolmentRequest(asked.serial_number, asked.spki_sha256, _pem(asked))
        answer = await self.enrolments.request(certificate_id, wanted, _source(request))
        number = answer.enrolment_no
        if number is not None and answer.state is EnrolmentState.REQUESTED:
            answer = await self._wait_for_certificate(number, asked.serial_number, answer)
        elif number is not None and answer.state is EnrolmentState.ISSUED:
            with suppress(RPCError):  # only where its run was lost; the certificate is there anyway
                await self._start(number, asked.serial_number)
        if answer.state in (EnrolmentState.REFUSED, EnrolmentState.CONFLICT):
            log.info("refused", serial=asked.serial_number, reason=answer.reason, source=_source(request))
        return _answered(answer)

    async def reenroll(self, request: Request) -> Response:
        """A device's next certificate, for a new key."""
        device = await self._device(request)
        asked = read_request(await est.read_body(request))
        if asked.serial_number not in (device.serial_number, device.device_id):
            raise _NotAllowed(
                403,
                f"the request is for {asked.serial_number}, expected {device.serial_number} or {device.device_id}; "
                "a device gets certificates for itself alone",
            )
        if asked.spki_sha256 == device.spki_sha256:
            raise _NotAllowed(403, "the request is for the key that has a certificate already; make a new key")
        wanted = ReissueCertificateInput(
            device_id=device.device_id,
            certificate_id=device.certificate_id,
            public_key=_pem(asked),
            source=_source(request),
        )
        handle = await start_reissue(self.client, wanted, asked.spki_sha256)
        try:
            result = await asyncio.wait_for(handle.result(), max(self.wait_seconds, 0.001))
        except TimeoutError:
            return est.later(ASK_AGAIN_SECONDS, "the certificate is being made; ask again")
        if result.refused:
            return est.refused(403, result.refused)
        if self.renewed is not None:
            await self.renewed(device.device_id)
        return est.issued(result.certificate)

    async def confirm(self, request: Request) -> Response:
        """The device has its certificate and uses it: the handshake has proved it."""
        device = await self._device(request)
        if not await self.peers.confirm(device.certificate_id, device.device_id):
            raise _NotAllowed(403, f"this certificate of {device.device_id} is valid no more")
        return Response(status_code=204)

    # --- steps -------------------------------------------------------------------------------------------------------

    async def _wait_for_certificate(self, number: int, serial_number: str, answer: EnrolmentAnswer) -> EnrolmentAnswer:
        deadline = time.monotonic() + self.wait_seconds
        started = 0.0
        with self.changes.of(number) as changed:
            while answer.state is EnrolmentState.REQUESTED:
                if time.monotonic() - started > RESTART_SECONDS:
                    await self._start(number, serial_number)
                    started = time.monotonic()
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), min(LOOK_SECONDS, left))
                changed.clear()
                answer = await self.enrolments.answer(number)
        return answer

    async def _start(self, number: int, serial_number: str) -> None:
        await start_provisioning(self.client, ProvisionDeviceInput(enrolment_no=number, serial_number=serial_number))

    def _shown(self, request: Request) -> str:
        """The id of the certificate that the client has shown, of a CA that is believed."""
        der: bytes | None = getattr(request.state, PEER, None)
        if der is None:
            raise _NotAllowed(401, "expected a client certificate: a claim certificate to enrol, a device's own later")
        if not self.trust.issued(x509.load_der_x509_certificate(der)):
            raise _NotAllowed(403, "the authority of this certificate is retired")
        return hashlib.sha256(der).hexdigest()

    async def _device(self, request: Request) -> DevicePeer:
        certificate_id = self._shown(request)
        device = await self.peers.device(certificate_id)
        if device is None:
            what = "a claim certificate" if await self.peers.is_claim(certificate_id) else "an unknown certificate"
            raise _NotAllowed(403, f"expected a device certificate, got {what}")
        if device.refused:
            raise _NotAllowed(403, device.refused)
        return device

    def _guarded(self, name: str, answer: Answer) -> Answer:
        """Errors become answers; everything is counted."""

        async def handle(request: Request) -> Response:
            began = time.perf_counter()
            response = await _safely(answer, request)
            SECONDS.labels(name).observe(time.perf_counter() - began)
            REQUESTS.labels(name, str(response.status_code)).inc()
            return response

        return handle


async def _safely(answer: Answer, request: Request) -> Response:
    try:
        return await answer(request)
    except _NotAllowed as error:
        return est.refused(error.status, str(error))
    except InvalidInputError as error:
        return est.refused(400, str(error))
    except (psycopg.OperationalError, PoolTimeout) as error:
        log.warning("PostgreSQL does not answer", reason=str(error).strip()[:200])
        return est.unavailable("the registry does not answer; ask again")
    except RPCError as error:
        log.warning("Temporal does not answer", reason=str(error)[:200])
        return est.unavailable("the enrolment process cannot be started now; ask again")
    except WorkflowFailureError as error:
        log.warning("a certificate could not be made", reason=str(error.cause)[:200])
        return est.unavailable("the certificate could not be made; ask again")


def _answered(answer: EnrolmentAnswer) -> Response:
    match answer.state:
        case EnrolmentState.ISSUED | EnrolmentState.ACTIVE if answer.certificate is not None:
            return est.issued(answer.certificate)
        case EnrolmentState.REQUESTED:
            return est.later(ASK_AGAIN_SECONDS, "the certificate is being made; ask again")
        case EnrolmentState.WAITING:
            return est.later(ASK_PERSON_AGAIN_SECONDS, f"{answer.reason or 'a person has to approve it'}; ask again")
        case _:
            return est.refused(403, answer.reason or f"the enrolment is {answer.state}")


def _pem(asked: CertificateRequest) -> str:
    return asked.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _source(request: Request) -> str | None:
    return request.client.host if request.client else None
