"""`python -m bench.newcomers`: devices that come for the first time, as light as they can be; started by bench.provisioning.

Each makes a key, has its own TLS handshake with the enrolment server, gets a certificate with the claim of its batch,
connects to the broker with it, asks for its configuration, reports it, sends a heartbeat, and leaves. Nothing is kept but
the files that TLS wants to read. What it is to do comes as one line of JSON on standard input; it starts at the next
line, prints one line of JSON when every device has gone through, and lives on until standard input ends, so that what it
has used can be measured.
"""

import asyncio
import base64
import logging
import re
import ssl
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import gmqtt
import orjson
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, pkcs7
from gmqtt.mqtt.constants import MQTTv311
from gmqtt.mqtt.handler import MQTTConnectError
from pydantic import BaseModel

from agent.credentials import common_name, make_request
from models.protocol import config_topic

ANSWER_SECONDS = 60.0
TRIES = 20
"""Of each step, when nobody answers or the server says to come again."""
RETRY_SECONDS = 0.5
STEPS = ("enrol", "connect", "configure")

T = TypeVar("T")
_MUTE = logging.getLogger("bench.gmqtt")
_MUTE.setLevel(logging.CRITICAL)


class NewcomersTask(BaseModel):
    """What one process of newcomers is to do."""

    enrolment_url: str
    mqtt_host: str
    mqtt_port: int
    ca: Path
    claim_certificate: Path
    claim_key: Path
    folder: Path
    serials: list[str]
    at_once: int


class StepError(Exception):
    """A step did not work this time; `after`: seconds that the server wants it to be tried again after."""

    def __init__(self, text: str, after: float = RETRY_SECONDS) -> None:
        super().__init__(text)
        self.after = after


@dataclass
class Newcomers:
    """The devices of one process."""

    task: NewcomersTask
    seconds: dict[str, list[float]] = field(default_factory=lambda: {step: [] for step in STEPS})
    again: Counter[str] = field(default_factory=Counter)
    gave_up: int = 0

    async def run(self) -> dict[str, Any]:
        """All of them, `at_once` at a time; what it took."""
        claim = ssl.create_default_context(cafile=str(self.task.ca))
        claim.load_cert_chain(self.task.claim_certificate, self.task.claim_key)
        waiting = iter(self.task.serials)

        async def one_after_the_other() -> None:
            for serial in waiting:
                try:
                    await self._live(serial, claim)
                except StepError as error:
                    self.gave_up += 1
                    print(f"{serial}: {error}", file=sys.stderr, flush=True)

        await asyncio.gather(*(one_after_the_other() for _ in range(self.task.at_once)))
        return {
            "devices": len(self.task.serials),
            "gave_up": self.gave_up,
            "again": dict(self.again),
            "p50_seconds": {step: statistics.median(taken) for step, taken in self.seconds.items() if taken},
            "p99_seconds": {
                step: sorted(taken)[len(taken) * 99 // 100] for step, taken in self.seconds.items() if taken
            },
        }

    async def _live(self, serial: str, claim: ssl.SSLContext) -> None:
        """From the first request to the first heartbeat."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = make_request(key, serial)
        certificate = await self._step("enrol", lambda: self._enrol(request, claim))
        path = self.task.folder / f"{serial}.pem"
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(secret + certificate.public_bytes(Encoding.PEM))
        own = ssl.create_default_context(cafile=str(self.task.ca))
        own.load_cert_chain(path)
        device = Device(common_name(certificate))
        await self._step("connect", lambda: device.connect(self.task.mqtt_host, self.task.mqtt_port, own))
        try:
            await self._step("configure", device.configure)
            device.beat()
        finally:
            await device.leave()

    async def _step(self, name: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do it, and again when it does not work."""
        began, failed = time.monotonic(), ""
        for _ in range(TRIES):
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    done = await work()
                self.seconds[name].append(time.monotonic() - began)
                return done
            except (StepError, OSError, EOFError, MQTTConnectError) as error:
                self.again[name] += 1
                failed = f"{type(error).__name__}: {error}"
                await asyncio.sleep(getattr(error, "after", RETRY_SECONDS))
        raise StepError(f"{name}: {failed}")

    async def _enrol(self, request: bytes, claim: ssl.SSLContext) -> x509.Certificate:
        """EST `simpleenroll` (RFC 7030, 4.2) over a connection of its own."""
        url = urlsplit(self.task.enrolment_url)
        assert url.hostname is not None and url.port is not None
        reader, writer = await asyncio.open_connection(url.hostname, url.port, ssl=claim)
        try:
            body = base64.b64encode(request)
            head = f"POST /.well-known/est/simpleenroll HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n"
            head += f"Content-Type: application/pkcs10\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answered, _, content = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.transport.abort()
        status = answered.split(b" ", 2)[1:2]
        if status != [b"200"]:
            asked = re.search(rb"\r\nretry-after: (\d+)", answered, re.IGNORECASE)
            after = float(asked[1]) if asked else RETRY_SECONDS
            raise StepError(f"enrolment answered {answered[:40]!r} {content[:80]!r}", after)
        return pkcs7.load_der_pkcs7_certificates(base64.b64decode(content))[0]


class Device:
    """One device's MQTT session."""

    def __init__(self, thing: str) -> None:
        self.thing = thing
        self._client = gmqtt.Client(thing, clean_session=True, logger=_MUTE)
        self._client.set_config({"reconnect_retries": 0})
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe

    async def connect(self, host: str, port: int, context: ssl.SSLContext) -> None:
        """Connect, and subscribe to the answers about its configuration."""
        await self._client.connect(host, port, ssl=context, keepalive=120, version=MQTTv311)
        granted = self._expect("suback")
        self._client.subscribe(config_topic(self.thing, "+", "+"), qos=1)
        await granted

    async def configure(self) -> None:
        """Ask what is wanted, and report just that."""
        wanted = (await self._ask("get", {}))["state"]["desired"]
        await self._ask("update", {"state": {"reported": wanted}})

    def beat(self) -> None:
        """A heartbeat."""
        heartbeat = {"deviceId": self.thing, "uptime": 1, "bootId": self.thing}
        self._client.publish(f"devices/{self.thing}/heartbeat", orjson.dumps(heartbeat), qos=1)

    async def leave(self) -> None:
        """Disconnect in good order: what was published goes first."""
        await self._client.disconnect()

    async def _ask(self, verb: str, document: dict[str, Any]) -> dict[str, Any]:
        answer = self._expect(verb)
        payload = orjson.dumps(document | {"clientToken": verb})
        self._client.publish(config_topic(self.thing, verb), payload, qos=1)
        return await answer

    def _expect(self, what: str) -> "asyncio.Future[dict[str, Any]]":
        self._answers[what] = asyncio.get_running_loop().create_future()
        return self._answers[what]

    def _on_message(self, _client: Any, topic: str, payload: bytes, _qos: int, _properties: Any) -> int:
        *_, verb, outcome = topic.split("/")
        answer = self._answers.get(verb)
        if answer is not None and not answer.done():
            if outcome == "accepted":
                answer.set_result(orjson.loads(payload))
            elif outcome == "rejected":
                answer.set_exception(StepError(f"{topic}: {payload[:200]!r}"))
        return 0

    def _on_subscribe(self, _client: Any, _mid: int, granted: Any, _properties: Any) -> None:
        answer = self._answers["suback"]
        if not answer.done():
            refused = any(code >= 0x80 for code in granted)
            answer.set_exception(StepError("subscription refused")) if refused else answer.set_result({})


async def main() -> None:
    """Read the task, wait for the word, run it, tell what it took."""
    task = NewcomersTask.model_validate_json(sys.stdin.readline())
    print("ready", flush=True)
    sys.stdin.readline()
    print(orjson.dumps(await Newcomers(task).run()).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    uvloop.run(main())
