"""What devices answer to diagnostic requests, and the orders to reboot, which the gateway signs: it alone has the key.

A worker that wants a device to reboot leaves a row and a notification (store/diagnostics.py); here the order is signed,
bound to the device, the request and the delay, and sent. Neither PostgreSQL nor Temporal ever holds it.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence

import orjson
import psycopg
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import Counter
from psycopg import AsyncConnection

from firmware.envelope import EnvelopeSigner
from firmware.reboot import MAX_LIFETIME_SECONDS, REBOOT, REBOOT_PAYLOAD_TYPE, RebootOrder, reboot_token
from gateway.requests import Request
from models.protocol import DiagnosticType, diagnostics_topic
from observe.stopping import pause
from store.diagnostics import REBOOT_CHANNEL, DiagnosticAnswer, RebootToSign, answer_questions, open_reboot
from store.listening import heard

DIAGNOSTICS = Counter(
    "tidegate_gateway_diagnostics_total",
    "Answers to diagnostic requests that counted, those that changed nothing, and orders to reboot that were sent.",
    ["what"],
)
RETRY_SECONDS = 1.0

log = structlog.get_logger("gateway")


async def take_diagnostics(connection: AsyncConnection, requests: Sequence[Request]) -> None:
    """Keep the answers, and tell the workflows that wait for them. Answers to no open question are counted, no more."""
    answers = [
        DiagnosticAnswer(request.topic.thing, said.request_id, said.answer, said.error, said.refused_order)
        for request in requests
        if (said := request.diagnostic) is not None
    ]
    if answers:
        counted = await answer_questions(connection, answers)
        DIAGNOSTICS.labels("answered").inc(counted)
        DIAGNOSTICS.labels("ignored").inc(len(answers) - counted)


class RebootSigner:
    """Makes the request that reboots a device."""

    def __init__(self, order_key: Ed25519PrivateKey) -> None:
        self._signer = EnvelopeSigner(order_key, REBOOT_PAYLOAD_TYPE)

    def request(self, wanted: RebootToSign, now: int) -> tuple[str, bytes]:
        """Topic and payload; signed anew each time, valid as long as it is wanted, and for five minutes at most."""
        expires_at = max(now + 1, min(int(wanted.expires_at), now + MAX_LIFETIME_SECONDS))
        order = RebootOrder(
            device_id=wanted.device_id,
            request_id=wanted.request_id,
            operation=REBOOT,
            delay_seconds=wanted.delay_seconds,
            issued_at=now,
            expires_at=expires_at,
            nonce=secrets.token_hex(16),
        )
        body = {
            "requestId": wanted.request_id,
            "type": DiagnosticType.REBOOT,
            "delaySeconds": wanted.delay_seconds,
            "confirmationToken": reboot_token(order, self._signer),
            "expiresAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(expires_at)),
        }
        return diagnostics_topic(wanted.device_id, "request"), orjson.dumps(body)


async def order_reboots(
    database_url: str, signer: RebootSigner, publish: Callable[[str, bytes], None], stop: asyncio.Event
) -> None:
    """Send what is wanted until `stop` is set. A notification that is missed comes again: who asks repeats."""
    while not stop.is_set():
        try:
            async with await AsyncConnection.connect(database_url, autocommit=True) as listener:
                await listener.execute(f"LISTEN {REBOOT_CHANNEL}".encode())
                while not stop.is_set():
                    for request_id in await heard(listener, stop):
                        wanted = await open_reboot(listener, request_id)
                        if wanted is not None:
                            publish(*signer.request(wanted, int(time.time())))
                            DIAGNOSTICS.labels("reboot-ordered").inc()
        except psycopg.Error as error:
            log.warning("cannot hear of reboots to order, trying again", reason=str(error).strip()[:200])
            await pause(stop, RETRY_SECONDS)
