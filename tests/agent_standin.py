"""A stand-in for the gateway: the jobs protocol as a device sees it, in memory, with real signatures and real deltas.

For the agent's tests alone. `StandInJobs` answers requests; `DirectClient` is the agent's own client with the broker
taken out; `StandInGateway` puts the same jobs behind a real broker.
"""

import asyncio
import contextlib
import hashlib
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import aiomqtt
import httpx
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn import Config, Server

from agent.client import Broker, JobsClient, Patience
from agent.errors import RejectedError, UnansweredError
from firmware.command import COMMAND_PAYLOAD_TYPE, Command, encode_command
from firmware.delta import make_delta
from firmware.envelope import EnvelopeSigner
from firmware.keys import TrustedKeys, generate_private_key
from firmware.manifest import (
    ORDER_PAYLOAD_TYPE,
    RELEASE_PAYLOAD_TYPE,
    Order,
    ReleaseStatement,
    encode_order,
    encode_release,
)
from models.protocol import command_topic, config_topic, jobs_topic, parse_request_topic

FINAL = {"SUCCEEDED", "FAILED", "REJECTED", "TIMED_OUT", "CANCELED"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 512):
        yield data[start : start + 512]


@dataclass(frozen=True)
class Published:
    """A release with its artifacts' entries in job documents."""

    version: str
    statement_sha256: str
    envelope: dict[str, Any]
    full: dict[str, Any]
    deltas: list[dict[str, Any]]


class Publisher:
    """Both keys, and what has been published with them."""

    def __init__(self, base_url: str = "http://artifacts.test") -> None:
        self.release_private, self.order_private = generate_private_key(), generate_private_key()
        self.release_signer = EnvelopeSigner(self.release_private, RELEASE_PAYLOAD_TYPE)
        self.order_signer = EnvelopeSigner(self.order_private, ORDER_PAYLOAD_TYPE)
        self.keys = TrustedKeys.of([self.release_private.public_key()], [self.order_private.public_key()])
        self.base_url = base_url
        self.artifacts: dict[str, bytes] = {}

    def keep(self, data: bytes) -> str:
        self.artifacts[sha256(data)] = data
        return f"{self.base_url}/artifacts/{sha256(data)}"

    def publish(
        self, image: bytes, version: str, *, counter: int = 0, bases: tuple[bytes, ...] = (), hardware: str = "motor"
    ) -> Published:
        statement = ReleaseStatement(
            "motor-controller", version, (hardware,), counter, sha256(image), len(image), 1_700_000_000
        )
        payload = encode_release(statement)
        deltas = []
        for base in bases:
            patch = make_delta(base, image)
            deltas.append(
                {"base_sha256": sha256(base), "url": self.keep(patch), "sha256": sha256(patch)}
                | {"size": len(patch), "codec": "bsdiff4"}
            )
        full = {"url": self.keep(image), "sha256": sha256(image), "size": len(image), "compression": None}
        return Published(version, sha256(payload), self.release_signer.sign(payload), full, deltas)

    def document(self, thing: str, job_id: str, attempt: int, release: Published, **order: Any) -> dict[str, Any]:
        now = int(time.time())
        fields = {
            "device_id": thing,
            "job_id": job_id,
            "attempt": attempt,
            "operation": "firmware-update",
            "release_sha256": release.statement_sha256,
            "issued_at": now,
            "expires_at": now + 3600,
            "nonce": random.randbytes(16).hex(),
        }
        return {
            "operation": "firmware-update",
            "version": release.version,
            "order": self.order_signer.sign(encode_order(Order(**{**fields, **order}))),
            "release": release.envelope,
            "full": release.full,
            "deltas": release.deltas,
        }

    def http(self) -> httpx.AsyncClient:
        """A client that finds the artifacts without a socket, ranges included."""

        def answer(request: httpx.Request) -> httpx.Response:
            data = self.artifacts.get(request.url.path.rpartition("/")[2])
            if data is None:
                return httpx.Response(404)
            etag = f'"{sha256(data)}"'
            found = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
            if found and request.headers.get("if-range") == etag and int(found[1]) < len(data):
                start = int(found[1])
                span = f"bytes {start}-{len(data) - 1}/{len(data)}"
                return httpx.Response(206, content=_pieces(data[start:]), headers={"content-range": span, "etag": etag})
            return httpx.Response(200, content=_pieces(data), headers={"etag": etag})

        return httpx.AsyncClient(transport=httpx.MockTransport(answer))


@dataclass
class Job:
    """One execution on the stand-in server."""

    job_id: str
    release: Published
    attempts: int = 1
    attempt: int = 1
    status: str = "QUEUED"
    version: int = 1
    details: dict[str, str] = field(default_factory=dict)


class StandInJobs:
    """Executions of many things, one at a time for each. Every accepted update is in `log`."""

    def __init__(self, publisher: Publisher) -> None:
        self.publisher = publisher
        self.jobs: dict[str, Job] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.seen: Callable[[str, str, dict[str, str]], None] = lambda thing, status, details: None
        self.tamper: Callable[[dict[str, Any]], dict[str, Any]] = lambda document: document

    def queue(self, thing: str, job_id: str, release: Published, attempts: int = 1) -> Job:
        self.jobs[thing] = Job(job_id, release, attempts)
        return self.jobs[thing]

    def end(self, thing: str, status: str) -> None:
        job = self.jobs[thing]
        job.status, job.version = status, job.version + 1

    def answer(self, thing: str, job_id: str | None, verb: str, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        if verb == "start-next":
            return "accepted", self._start_next(thing)
        return self._update(thing, job_id, body)

    def _start_next(self, thing: str) -> dict[str, Any]:
        job = self.jobs.get(thing)
        if job is None or job.status in FINAL:
            return {"timestamp": int(time.time())}
        if job.status == "QUEUED":
            job.status, job.version = "IN_PROGRESS", job.version + 1
        document = self.publisher.document(thing, job.job_id, job.attempt, job.release)
        return {
            "timestamp": int(time.time()),
            "execution": {
                "jobId": job.job_id,
                "thingName": thing,
                "status": job.status,
                "versionNumber": job.version,
                "executionNumber": job.attempt,
                "statusDetails": job.details,
                "jobDocument": self.tamper(document),
            },
        }

    def _update(self, thing: str, job_id: str | None, body: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        job = self.jobs.get(thing)
        if job is None or job.job_id != job_id:
            return "rejected", {"code": "ResourceNotFound", "message": "no such execution"}
        state = {"status": job.status, "statusDetails": job.details, "versionNumber": job.version}
        if job.status in FINAL:
            return "rejected", {"code": "TerminalStateReached", "message": "it has ended", "executionState": state}
        if body.get("expectedVersion") != job.version or body.get("executionNumber") != job.attempt:
            return "rejected", {"code": "VersionMismatch", "message": "not the version", "executionState": state}
        job.status, job.details, job.version = body["status"], dict(body["statusDetails"]), job.version + 1
        self.log.append((thing, job.status, job.details))
        self.seen(thing, job.status, job.details)
        if job.status == "FAILED" and job.attempt < job.attempts:
            job.status, job.attempt = "QUEUED", job.attempt + 1
        return "accepted", {"timestamp": int(time.time())}


class DirectClient(JobsClient):
    """The agent's client without a broker: a request is answered on the spot. `deaf`: nobody answers."""

    def __init__(self, thing: str, jobs: StandInJobs) -> None:
        patience = Patience(answer_seconds=0.01, step_seconds=0.0, finish_seconds=0.0)
        super().__init__(thing, Broker("nowhere", 0), patience, random.Random(1))
        self.jobs = jobs
        self.deaf = False

    async def request(self, *parts: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if self.deaf:
            raise UnansweredError("nobody there")
        job_id = parts[0] if len(parts) == 2 else None
        kind, answer = self.jobs.answer(self.thing, job_id, parts[-1], body)
        if kind == "rejected":
            raise RejectedError("/".join(parts), answer["code"], answer["message"], answer.get("executionState"))
        return answer


class StandInGateway:
    """The same jobs behind a real broker. `mute`: requests are heard and not answered.

    `configs`: the configuration wanted of a thing, `reported`: what it says it runs. `open_commands`: the one that a
    thing gets when it asks, until it has answered; all answers are in `responses`.
    """

    def __init__(self, jobs: StandInJobs, host: str, port: int) -> None:
        self.configs: dict[str, dict[str, Any]] = {}
        self.reported: dict[str, dict[str, Any]] = {}
        self.config_updates = 0
        self.open_commands: dict[str, dict[str, Any]] = {}
        self.responses: list[dict[str, Any]] = []
        self.jobs = jobs
        self.host, self.port = host, port
        self.mute = False
        self.heartbeats: list[dict[str, Any]] = []
        self._client: aiomqtt.Client | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["StandInGateway"]:
        async with aiomqtt.Client(self.host, self.port) as client:
            self._client = client
            await client.subscribe("devices/+/heartbeat")
            await client.subscribe("$aws/things/+/jobs/start-next", qos=1)
            await client.subscribe("$aws/things/+/jobs/+/update", qos=1)
            for name in ("get", "update"):
                await client.subscribe(f"$aws/things/+/shadow/name/config/{name}", qos=1)
                await client.subscribe(f"$aws/things/+/shadow/{name}", qos=1)
            for name in ("get", "response"):
                await client.subscribe(f"devices/+/commands/{name}", qos=1)
            task = asyncio.create_task(self._serve(client))
            try:
                yield self
            finally:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def hint(self, thing: str) -> None:
        assert self._client is not None
        await self._client.publish(jobs_topic(thing, "notify-next"), orjson.dumps({"execution": {}}))

    async def configure(self, thing: str, version: int, config: dict[str, Any]) -> None:
        """Want a configuration, and say so."""
        assert self._client is not None
        self.configs[thing] = {"version": version, "config": config}
        delta = {"version": version, "state": self.configs[thing], "timestamp": int(time.time())}
        await self._client.publish(config_topic(thing, "update", "delta"), orjson.dumps(delta))

    async def command(self, thing: str, operation: str, request_id: str, /, **fields: Any) -> dict[str, Any]:
        """Open a signed command, and hint at it."""
        assert self._client is not None
        now = int(time.time())
        command = Command(thing, request_id, operation, now, now + 900, random.randbytes(16).hex())
        payload = encode_command(replace(command, **fields))
        signer = EnvelopeSigner(self.jobs.publisher.order_private, COMMAND_PAYLOAD_TYPE)
        body = {"requestId": request_id, "operation": operation, "order": signer.sign(payload)}
        self.open_commands[thing] = body
        await self._client.publish(command_topic(thing, "notify"), orjson.dumps({"timestamp": now}))
        return body

    async def _manage(self, client: aiomqtt.Client, topic: str, thing: str, verb: str, body: dict[str, Any]) -> bool:
        """Configuration and commands. False: it was another request."""
        now = {"timestamp": int(time.time())}
        if verb == "config-get":
            state = {"desired": self.configs.get(thing), "reported": self.reported.get(thing)}
            state = {name: section for name, section in state.items() if section}
            kind, answer = ("accepted", {"state": state}) if state else ("rejected", {"code": 404, "message": "none"})
        elif verb == "config-update":
            self.reported[thing] = body["state"]["reported"]
            self.config_updates += 1
            kind, answer = "accepted", {"state": body["state"]}
        elif verb == "shadow-get":
            kind, answer = "rejected", {"code": 404, "message": "nothing is wanted"}
        elif verb == "command-get":
            await client.publish(command_topic(thing, "request"), orjson.dumps(self.open_commands.get(thing, now)))
            return True
        elif verb == "command-response":
            self.responses.append(body)
            if body["status"] != "accepted":
                self.open_commands.pop(thing, None)
            return True
        else:
            return False
        answer |= now | {"clientToken": body.get("clientToken")}
        await client.publish(f"{topic}/{kind}", orjson.dumps(answer))
        return True

    async def _serve(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic = str(message.topic)
            request = parse_request_topic(topic)
            body = orjson.loads(message.payload)
            if request is None or self.mute:
                continue
            if request.verb == "heartbeat":
                self.heartbeats.append(body)
                continue
            if await self._manage(client, topic, request.thing, request.verb, body):
                continue
            kind, answer = self.jobs.answer(request.thing, request.job_id, request.verb, body)
            answer |= {"clientToken": body.get("clientToken")}
            await client.publish(f"{topic}/{kind}", orjson.dumps(answer))


@contextlib.asynccontextmanager
async def serving_artifacts(port: int) -> AsyncIterator[Publisher]:
    """A publisher whose artifacts are served over HTTP on loopback."""
    publisher = Publisher(f"http://127.0.0.1:{port}")

    async def artifact(request: Request) -> Response:
        data = publisher.artifacts.get(request.path_params["digest"])
        return Response(status_code=404) if data is None else Response(data)

    server = Server(Config(Starlette(routes=[Route("/artifacts/{digest}", artifact)]), port=port, log_level="error"))
    task = asyncio.create_task(server.serve())
    try:
        yield publisher
    finally:
        server.should_exit = True
        await task
