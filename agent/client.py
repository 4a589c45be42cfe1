"""The device's MQTT session: requests with their answers, hints, commands, heartbeats, and a connection that comes back.

Requests go out at QoS 1 and are matched to their answers by clientToken. An answer that does not come in time is
UnansweredError: the request may have been carried out, so whoever repeats it sends the version it knows. While the
broker is away, requests wait; connecting again is spread by jitter, so that a fleet does not come back in one instant.

A device with credentials connects with the best of its certificates; after a failure the next one is tried, so that a
rotation which has gone wrong never leaves it outside (`Passports`).
"""

import asyncio
import contextlib
import random
import secrets
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiomqtt
import orjson

from agent.errors import CredentialError, RejectedError, UnansweredError
from agent.jobs import Answer, Execution, Refusal, judge_rejection, parse_execution, update_request
from agent.logbook import LogBook
from agent.passports import Passports
from agent.trust import Trust
from models.errors import InvalidInputError
from models.protocol import (
    MAX_REQUEST_BYTES,
    ExecutionState,
    Step,
    command_topic,
    config_topic,
    diagnostics_topic,
    heartbeat_topic,
    jobs_topic,
    shadow_topic,
)

_SUBACK_FAILURE = 0x80


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is, and as whom to connect. `protocol`: 4 is MQTT 3.1.1, 5 is MQTT 5."""

    host: str
    port: int
    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    protocol: int = 4

    @classmethod
    def at(cls, url: str, **more: Any) -> "Broker":
        """From `mqtt://host[:port]` or `mqtts://host[:port]`. Raises InvalidInputError."""
        parts = urlsplit(url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise InvalidInputError(f"not a broker's address: {url!r}, expected mqtt://host:port or mqtts://host:port")
        tls = parts.scheme == "mqtts"
        return cls(parts.hostname, parts.port or (8883 if tls else 1883), tls=tls, **more)

    def tls_context(self, trust: Trust | None = None) -> ssl.SSLContext | None:
        """For `mqtts`: the CAs to trust (`ca` alone where `trust` is not given) and the device's certificate."""
        if not self.tls:
            return None
        context = (trust or Trust(self.ca)).context()
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.private_key)
        return context


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the session waits for what. `step` and `finish`: for a report, repeats included. `proof`: for a connection
    with a new certificate."""

    answer_seconds: float = 10.0
    step_seconds: float = 30.0
    finish_seconds: float = 60.0
    proof_seconds: float = 30.0
    reconnect_seconds: float = 1.0
    reconnect_most_seconds: float = 60.0


MOST_COMMANDS = 8
"""Command messages that wait to be looked at; what is dropped comes again when it is asked for."""
MOST_QUESTIONS = 8
"""The same for diagnostic requests; whoever asks repeats."""


class JobsClient:
    """One device's session with the gateway. `run` keeps it connected until it is cancelled.

    Events for whoever waits: `hint` (ask for a job), `config_hint` (ask for the configuration), `shadow_hint` (ask for
    the shadow), `command_hint` (ask for a command); all of them are set with every connection, for what was published
    meanwhile is lost. `commands` holds what came on `commands/request`, `questions` what came on `diagnostics/request`.
    `log` notes what the session goes through.
    """

    def __init__(
        self,
        thing: str,
        broker: Broker,
        patience: Patience | None = None,
        rng: random.Random | None = None,
        passports: Passports | None = None,
        log: LogBook | None = None,
    ):
        self.thing = thing
        self.hint = asyncio.Event()
        self.config_hint = asyncio.Event()
        self.shadow_hint = asyncio.Event()
        self.command_hint = asyncio.Event()
        self.commands: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MOST_COMMANDS)
        self.questions: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MOST_QUESTIONS)
        self.log = log or LogBook()
        self.connected = asyncio.Event()
        self._passports = passports
        self._receiving: asyncio.Task[None] | None = None
        self.errors = 0
        self.patience = patience or Patience()
        self.rng = rng or random.Random()
        self._broker = broker
        self._client: aiomqtt.Client | None = None
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._session = secrets.token_hex(6)
        self._count = 0

    async def run(self) -> None:
        """Connect, subscribe, receive; and again, when the connection is lost."""
        failures = 0
        while True:
            try:
                async with self._connect() as client:
                    _heed_cancellation()
                    await self._subscribe(client)
                    _heed_cancellation()
                    self._client, failures = client, 0
                    self._came()
                    if await self._receive(client):
                        continue
            except (aiomqtt.MqttError, OSError, UnansweredError, CredentialError) as error:
                _heed_cancellation()
                self.errors += 1
                self.log.note(f"no connection: {error}")
                if self._passports is not None:
                    self._passports.failed()
            finally:
                self._client = None
                self.connected.clear()
            most = min(self.patience.reconnect_most_seconds, self.patience.reconnect_seconds * 2**failures)
            failures = min(failures + 1, 16)
            await asyncio.sleep(most * self.rng.uniform(0.5, 1.5))

    def drop(self) -> None:
        """End the connection, so that the next one is made at once with the best certificate."""
        if self._receiving is not None:
            self._receiving.cancel()

    def _came(self) -> None:
        if self._passports is not None:
            self._passports.worked()
        self.log.note(f"connected to {self._broker.host}:{self._broker.port}")
        self.connected.set()
        for hint in (self.hint, self.config_hint, self.shadow_hint, self.command_hint):
            hint.set()  # whatever was published meanwhile is lost: ask

    async def _receive(self, client: aiomqtt.Client) -> bool:
        """Take what comes until the connection is lost. True: `drop` has ended it."""

        async def take_all() -> None:
            async for message in client.messages:
                self._take(message)

        self._receiving = receiving = asyncio.create_task(take_all())
        try:
            await asyncio.wait([receiving])
        finally:
            receiving.cancel()
            self._receiving = None
        if receiving.cancelled():
            return True
        receiving.result()
        return False

    async def start_next(self, **details: str) -> Execution | None:
        """Ask for work: the execution in progress, else the next one. Raises UnansweredError, RejectedError.

        `details` are kept with an execution that starts: `bootId` is what a restart has to change.
        """
        return parse_execution(await self.request("start-next", body={"statusDetails": details} if details else {}))

    async def request(self, *parts: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a jobs request, and give its accepted answer. Raises as `ask` does."""
        return await self.ask(jobs_topic(self.thing, *parts), body)

    async def ask(self, topic: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request, and give its accepted answer.

        Raises:
            RejectedError: the gateway refused it.
            UnansweredError: not connected, or no answer, within `answer_seconds`.
        """
        self._count += 1
        token = f"{self._session}-{self._count}"
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[token] = future
        payload = orjson.dumps({**body, "clientToken": token})
        try:
            async with asyncio.timeout(self.patience.answer_seconds):
                await self.connected.wait()
                if self._client is not None:
                    await self._client.publish(topic, payload, qos=1)
                    _heed_cancellation()
                return await future
        except (TimeoutError, aiomqtt.MqttError) as error:
            _heed_cancellation()
            self.errors += 1
            raise UnansweredError(f"{topic}: no answer within {self.patience.answer_seconds} s") from error
        finally:
            del self._waiting[token]

    async def publish(self, topic: str, body: Mapping[str, Any]) -> None:
        """Publish at QoS 1; returns when the broker has it. Raises UnansweredError."""
        try:
            async with asyncio.timeout(self.patience.answer_seconds):
                await self.connected.wait()
                if self._client is None:
                    raise UnansweredError(f"{topic}: the connection is gone")
                await self._client.publish(topic, orjson.dumps(body), qos=1)
            _heed_cancellation()
        except (TimeoutError, aiomqtt.MqttError) as error:
            _heed_cancellation()
            self.errors += 1
            raise UnansweredError(f"{topic}: not taken within {self.patience.answer_seconds} s") from error

    async def heartbeat(self, body: Mapping[str, Any]) -> bool:
        """Publish a heartbeat; one that cannot be sent (False) is lost, the next one says more."""
        sent = False
        if self._client is not None:
            with contextlib.suppress(aiomqtt.MqttError):
                await self._client.publish(heartbeat_topic(self.thing), orjson.dumps(body), qos=0)
                sent = True
            _heed_cancellation()
        return sent

    def _connect(self) -> aiomqtt.Client:
        broker = self._broker
        if self._passports is not None:
            pair = self._passports.choose()
            broker = replace(broker, certificate=pair.certificate, private_key=pair.private_key)
        return aiomqtt.Client(
            broker.host,
            broker.port,
            identifier=self.thing,
            protocol=aiomqtt.ProtocolVersion(broker.protocol),
            clean_session=True if broker.protocol == aiomqtt.ProtocolVersion.V311 else None,
            tls_context=broker.tls_context(self._passports.trust if self._passports else None),
            timeout=self.patience.answer_seconds,
            keepalive=60,
        )

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        """The answers and hints for this device; every SUBACK is read, for a refusal is silence otherwise."""
        filters = [jobs_topic(self.thing, "notify-next")]
        filters += [jobs_topic(self.thing, "+", *verb, kind) for verb in ((), ("update",)) for kind in _ANSWERS]
        filters += [config_topic(self.thing, verb, kind) for verb in ("get", "update") for kind in _ANSWERS]
        filters += [config_topic(self.thing, "update", "delta")]
        filters += [shadow_topic(self.thing, "", verb, kind) for verb in ("get", "update") for kind in _ANSWERS]
        filters += [shadow_topic(self.thing, "", "update", "delta")]
        filters += [command_topic(self.thing, part) for part in ("request", "notify")]
        filters += [diagnostics_topic(self.thing, "request")]
        granted = await client.subscribe([(name, 0) for name in filters])
        refused = [name for name, code in zip(filters, granted, strict=True) if _code(code) >= _SUBACK_FAILURE]
        if refused:
            raise UnansweredError(f"the broker refused to subscribe {self.thing} to {', '.join(refused)}")

    def _take(self, message: aiomqtt.Message) -> None:
        topic, payload = str(message.topic), message.payload
        if topic == diagnostics_topic(self.thing, "request") and len(payload or b"") > MAX_REQUEST_BYTES:
            return
        try:
            body = orjson.loads(payload if isinstance(payload, bytes) else b"")
        except orjson.JSONDecodeError:
            return
        if topic.endswith("/notify-next"):
            if isinstance(body, dict) and "execution" in body:  # without one it says that nothing waits
                self.hint.set()
            return
        if self._announces(topic, body):
            return
        future = self._waiting.get(str(body.get("clientToken"))) if isinstance(body, dict) else None
        if future is None or future.done():
            return
        if topic.endswith("/accepted"):
            future.set_result(body)
        else:
            state = body.get("executionState")
            future.set_exception(
                RejectedError(
                    topic.removesuffix("/rejected"),
                    str(body.get("code")),
                    str(body.get("message")),
                    state if isinstance(state, dict) else None,
                )
            )

    def _announces(self, topic: str, body: Any) -> bool:
        """Whether it is a hint or a command, and not an answer."""
        if topic == config_topic(self.thing, "update", "delta"):
            self.config_hint.set()
        elif topic == shadow_topic(self.thing, "", "update", "delta"):
            self.shadow_hint.set()
        elif topic == command_topic(self.thing, "notify"):
            self.command_hint.set()
        elif topic == command_topic(self.thing, "request"):
            if isinstance(body, dict):
                with contextlib.suppress(asyncio.QueueFull):
                    self.commands.put_nowait(body)
        elif topic == diagnostics_topic(self.thing, "request"):
            if isinstance(body, dict):
                with contextlib.suppress(asyncio.QueueFull):
                    self.questions.put_nowait(body)
        else:
            return False
        return True


_ANSWERS = ("accepted", "rejected")


def _heed_cancellation() -> None:
    """Raise again a cancellation that came out of aiomqtt as an MqttError, as happens while a session ends, or not at all:
    `asyncio.wait_for`, which it uses, forgets a cancellation that comes together with the result (Python 3.11).

    Without it a device that is about to reboot waits for ever for a task that has not heard of its end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _code(granted: Any) -> int:
    """A SUBACK's code: an integer in MQTT 3.1.1, a ReasonCode in MQTT 5."""
    return int(getattr(granted, "value", granted))


class MqttReports:
    """Reports about one execution, with the version number that each of them needs."""

    def __init__(self, client: JobsClient, execution: Execution) -> None:
        self._client = client
        self._execution = execution
        self._version = execution.version_number

    async def step(self, step: Step, **details: str) -> Answer:
        """See Reports."""
        wanted = {"step": str(step), **details}
        return await self._send(ExecutionState.IN_PROGRESS, wanted, self._client.patience.step_seconds)

    async def finish(self, status: ExecutionState, details: Mapping[str, str]) -> Answer:
        """See Reports."""
        return await self._send(status, details, self._client.patience.finish_seconds)

    async def _send(self, status: ExecutionState, details: Mapping[str, str], seconds: float) -> Answer:
        deadline, pause = asyncio.get_running_loop().time() + seconds, 0.5
        while True:
            refusal = await self._try(status, details)
            if refusal is None:
                return Answer.ACCEPTED
            if refusal in (Refusal.OVER, Refusal.WRONG):
                return Answer.OVER
            if asyncio.get_running_loop().time() >= deadline:
                return Answer.UNREACHABLE
            if refusal is Refusal.AGAIN:
                await asyncio.sleep(pause * self._client.rng.uniform(0.5, 1.5))
                pause = min(10.0, pause * 2)

    async def _try(self, status: ExecutionState, details: Mapping[str, str]) -> Refusal | None:
        """One request; None when it was accepted."""
        body = update_request(status, details, self._version, self._execution.attempt)
        said = ", ".join(f"{key} {value}" for key, value in details.items())
        self._client.log.note(f"job {self._execution.job_id}: {status} {said}")
        try:
            await self._client.request(self._execution.job_id, "update", body=body)
        except UnansweredError:
            return Refusal.AGAIN
        except RejectedError as error:
            refusal, version = judge_rejection(error)
            if refusal is Refusal.NEW_VERSION:
                self._version = version
            return refusal
        self._version += 1
        return None
