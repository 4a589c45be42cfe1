"""The gateway's loop: gather messages for a moment, use them in one transaction, answer and acknowledge after commit.

- Order: batches follow one another, and inside a batch messages are handled as they came, so every device's order holds.
- A message is acknowledged to the broker only after the transaction that used it has committed; while PostgreSQL is away
  nothing is acknowledged, and the batch is tried again until it is back.
- A message that cannot be used is answered (where the protocol has an answer), counted and quarantined. If a whole batch
  fails for a reason of its content, its messages are tried one by one, and the one that fails is quarantined.
"""

import asyncio
import collections
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psycopg
import structlog
from prometheus_client import Counter, Gauge, Histogram
from psycopg_pool import PoolTimeout

from gateway.documents import Documents
from gateway.jobs import Outgoing, answer, reject
from gateway.requests import BadRequest, Heartbeat, Request, parse_request
from models.protocol import ErrorCode, RequestTopic, parse_request_topic
from models.settings import Settings
from store.devicetraffic import save_heartbeats, save_quarantined
from store.engine import Database
from store.executions import Batch, ExecutionStore
from transport.connection import Connection

log = structlog.get_logger("gateway")

MESSAGES = Counter("tidegate_gateway_messages_total", "Messages from devices, by verb.", ["verb"])
QUARANTINED = Counter("tidegate_gateway_quarantined_total", "Messages that could not be used, by code.", ["code"])
PUBLISHED = Counter("tidegate_gateway_published_total", "Messages to devices.")
RETRIES = Counter("tidegate_gateway_batch_retries_total", "Batches tried again because PostgreSQL was away.")
WAITING = Gauge("tidegate_gateway_waiting_messages", "Messages that wait for their batch.")
BATCH_SIZE = Histogram("tidegate_gateway_batch_messages", "Messages in a batch.", buckets=(1, 5, 20, 100, 500, 2000))
BATCH_SECONDS = Histogram(
    "tidegate_gateway_batch_seconds",
    "From a batch's first statement to its commit.",
    buckets=(0.005, 0.02, 0.1, 0.5, 2),
)
RETRY_SECONDS = 0.5
_AWAY = (psycopg.OperationalError, PoolTimeout, psycopg.errors.DeadlockDetected)


@dataclass(slots=True)
class Inbound:
    """A message and the promise to acknowledge it."""

    topic: RequestTopic | None
    raw_topic: str
    payload: bytes
    done: asyncio.Future[None]


@dataclass
class Gateway:
    """Connects devices' messages to the store. One active instance; see gateway/__main__.py for the standby."""

    db: Database
    connection: Connection
    documents: Documents
    settings: Settings
    waiting: list[Inbound] = field(default_factory=list)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _paused: bool = False

    def __post_init__(self) -> None:
        self._store = ExecutionStore(self.db)

    async def receive(self, topic: str | bytes, payload: bytes) -> None:
        """The handler of every message: returns, and so acknowledges it, when it has been used."""
        text = topic if isinstance(topic, str) else topic.decode("utf-8", "replace")
        inbound = Inbound(parse_request_topic(text), text, payload, asyncio.get_running_loop().create_future())
        self.waiting.append(inbound)
        self._arrived.set()
        if not self._paused and len(self.waiting) >= self.settings.gateway_queue_messages:
            self._paused = True
            self.connection.pause(True)
            log.warning("queue full, reading stopped", waiting=len(self.waiting))
        await inbound.done

    async def run(self, stop: asyncio.Event) -> None:
        """Handle batches until `stop` is set and nothing waits."""
        pause = self.settings.gateway_batch_milliseconds / 1000
        while not (stop.is_set() and not self.waiting):
            if stop.is_set():
                self.connection.pause(True)  # what has not been read yet comes again to the next gateway
            if not self.waiting:
                self._arrived.clear()
                await _first(self._arrived, stop)
                continue
            if len(self.waiting) < self.settings.gateway_batch_messages and not stop.is_set():
                await asyncio.sleep(pause)
            batch = self.waiting[: self.settings.gateway_batch_messages]
            del self.waiting[: len(batch)]
            WAITING.set(len(self.waiting))
            if self._paused and len(self.waiting) < self.settings.gateway_queue_messages // 2:
                self._paused = False
                self.connection.pause(False)
            await self._settle(batch)

    async def _settle(self, batch: Sequence[Inbound]) -> None:
        """Use a batch, whatever it takes; then publish the answers and acknowledge."""
        while True:
            started = time.perf_counter()
            try:
                outgoing = await self._transact(batch)
                break
            except _AWAY as error:
                RETRIES.inc()
                log.warning("PostgreSQL is away, batch kept", messages=len(batch), error=str(error).strip()[:200])
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:
                if len(batch) == 1:
                    log.exception("message cannot be used", topic=batch[0].raw_topic)
                    outgoing = await self._give_up_on(batch[0], error)
                    break
                log.warning(
                    "batch failed, trying its messages one by one", messages=len(batch), error=repr(error)[:200]
                )
                for inbound in batch:
                    await self._settle([inbound])
                return
        BATCH_SECONDS.observe(time.perf_counter() - started)
        BATCH_SIZE.observe(len(batch))
        for topic, payload in outgoing:
            self.connection.publish(topic, payload)
        PUBLISHED.inc(len(outgoing))
        for inbound in batch:
            if not inbound.done.done():
                inbound.done.set_result(None)

    async def _give_up_on(self, inbound: Inbound, error: Exception) -> list[Outgoing]:
        parsed = parse_request(inbound.topic, inbound.payload) if inbound.topic else None
        token = parsed.token if parsed else None
        bad = BadRequest(ErrorCode.INTERNAL_ERROR, "the request could not be handled; it has been kept", token)
        QUARANTINED.labels(bad.code.value).inc()
        thing = inbound.topic.thing if inbound.topic else None
        async with self.db.pool.connection() as connection:
            kept = [(inbound.raw_topic, thing, inbound.payload, bad.code.value, repr(error)[:300].replace("\x00", ""))]
            await save_quarantined(connection, kept)
        return reject(inbound.topic, bad, time.time()) if inbound.topic else []

    async def _transact(self, inbounds: Sequence[Inbound]) -> list[Outgoing]:
        """One transaction over a batch. Returns what to publish once it has committed."""
        verbs: collections.Counter[str] = collections.Counter()
        requests: list[Request] = []
        bad: list[tuple[Inbound, BadRequest]] = []
        for inbound in inbounds:
            parsed = (
                BadRequest(ErrorCode.INVALID_TOPIC, "no request has this topic")
                if inbound.topic is None
                else parse_request(inbound.topic, inbound.payload)
            )
            verbs[inbound.topic.verb.value if inbound.topic else "unknown"] += 1
            if isinstance(parsed, Request):
                requests.append(parsed)
            else:
                bad.append((inbound, parsed))
        for verb, count in verbs.items():
            MESSAGES.labels(verb).inc(count)
        asked = [request for request in requests if request.heartbeat is None]
        beats = {request.topic.thing: request.heartbeat for request in requests if request.heartbeat is not None}
        outgoing: list[Outgoing] = []
        if asked:
            things = list({request.topic.thing for request in asked})
            pairs = list({(r.topic.job_id, r.topic.thing) for r in asked if r.topic.job_id})
            async with self._store.batch(things, pairs) as batch:
                await self.documents.ensure(batch.connection, list(batch.ledger.jobs))
                for request in asked:
                    outgoing += answer(request, batch.ledger, self.documents, batch.now)
                await self._save_rest(batch.connection, beats, bad)
                self._log_trips(batch)
        elif beats or bad:
            async with self.db.pool.connection() as connection:
                await self._save_rest(connection, beats, bad)
        now = time.time()
        for inbound, reason in bad:
            QUARANTINED.labels(reason.code.value).inc()
            if inbound.topic is not None:
                outgoing += reject(inbound.topic, reason, now)
        return outgoing

    async def _save_rest(
        self,
        connection: psycopg.AsyncConnection,
        beats: Mapping[str, Heartbeat],
        bad: Sequence[tuple[Inbound, BadRequest]],
    ) -> None:
        if beats:
            await save_heartbeats(connection, beats)
        if bad:
            await save_quarantined(
                connection,
                [
                    (
                        inbound.raw_topic,
                        inbound.topic.thing if inbound.topic else None,
                        inbound.payload,
                        reason.code.value,
                        reason.message.replace("\x00", "\\0"),
                    )
                    for inbound, reason in bad
                ],
            )

    @staticmethod
    def _log_trips(batch: Batch) -> None:
        for job in batch.ledger.jobs.values():
            for wave in job.waves.values():
                if wave.news and wave.tripped_at == batch.now:
                    log.warning(
                        "breaker tripped",
                        job=job.job_id,
                        wave=wave.wave,
                        failed=wave.tripped_failed,
                        exposed=wave.tripped_exposed,
                    )


async def _first(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
