"""The gateway's loop: gather messages for a moment, use them in one transaction, answer and acknowledge after commit.

- Order: batches follow one another, and inside a batch messages are handled as they came, so every device's order holds.
- A message is acknowledged to the broker only after the transaction that used it has committed; while PostgreSQL is away
  nothing is acknowledged, and the batch is tried again until it is back.
- A message that cannot be used is answered (where the protocol has an answer), counted and quarantined. If a whole batch
  fails for a reason of its content, its messages are tried one by one, and the one that fails is quarantined.
- What a barred device says is acknowledged and forgotten. Every transaction holds `share_access` first, so a revocation
  commits either after it or before it has looked (store/access.py).
- What a broker had kept (a retained message) is no request: it is acknowledged and forgotten, too.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import psycopg
import structlog
from prometheus_client import Counter, Gauge, Histogram
from psycopg_pool import PoolTimeout

from gateway.alerting import Judge
from gateway.batches import COMMAND_VERBS, CONFIG_VERBS, SHADOW_VERBS, Inbound, Read, read_batch
from gateway.commands import answer_about_commands
from gateway.configuration import answer_config, reject_config
from gateway.diagnostics import take_diagnostics
from gateway.documents import Documents
from gateway.jobs import Outgoing, answer, reject
from gateway.pulse import note_pulses
from gateway.requests import BadRequest, Request, parse_request
from gateway.shadow import MAX_IN_FLIGHT, answer_about_shadows, reject_shadow
from models.identity import DeviceHappening
from models.protocol import ErrorCode, RequestTopic, Verb, parse_request_topic
from models.settings import Settings
from store.access import share_access
from store.configurations import load_configurations, save_configurations
from store.devicetraffic import (
    Standing,
    ask_standing,
    bar_clone,
    read_standing,
    save_heartbeats,
    save_quarantined,
)
from store.engine import Database
from store.executions import Batch, load_in_pipeline, save_in_pipeline
from store.waits import happened
from transport.connection import Connection, Receipt

log = structlog.get_logger("gateway")

QUARANTINED = Counter("tidegate_gateway_quarantined_total", "Messages that could not be used, by code.", ["code"])
PUBLISHED = Counter("tidegate_gateway_published_total", "Messages to devices.")
BARRED = Counter("tidegate_gateway_barred_total", "Messages of barred devices, which change nothing.")
RETAINED = Counter("tidegate_gateway_retained_total", "Messages that the broker had kept, which change nothing.")
CLONES = Counter("tidegate_gateway_clones_total", "Devices barred because their identity is used twice.")
THROTTLED = Counter(
    "tidegate_gateway_throttled_total", "Shadow requests rejected because too many of their device were unanswered."
)
RETRIES = Counter("tidegate_gateway_batch_retries_total", "Batches tried again because PostgreSQL was away.")
WAITING = Gauge("tidegate_gateway_waiting_messages", "Messages that wait for their batch.")
BATCH_SIZE = Histogram("tidegate_gateway_batch_messages", "Messages in a batch.", buckets=(1, 5, 20, 100, 500, 2000))
BATCH_SECONDS = Histogram(
    "tidegate_gateway_batch_seconds",
    "From a batch's first statement to its commit.",
    buckets=(0.005, 0.02, 0.1, 0.5, 2),
)
RETRY_SECONDS = 0.5
MAX_TOPICS = 16_384
"""Topics of heartbeats that are kept taken apart; they come again and again."""
_NO_TOPIC = BadRequest(ErrorCode.INVALID_TOPIC, "no request has this topic")
_NOT_OF_JOBS = CONFIG_VERBS | COMMAND_VERBS | {Verb.HEARTBEAT, Verb.DIAGNOSTIC_RESPONSE, Verb.PULSE}
_AWAY = (
    psycopg.OperationalError,
    PoolTimeout,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.ReadOnlySqlTransaction,  # a standby, until it has taken over
)


@dataclass
class Gateway:
    """Connects devices' messages to the store. One active instance; see gateway/__main__.py for the standby."""

    db: Database
    connection: Connection
    documents: Documents
    settings: Settings
    waiting: list[Inbound] = field(default_factory=list)
    judge: Judge = field(default_factory=Judge)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _first_at: float = 0.0
    """Since when the next batch has been gathering."""
    _topics: dict[str, RequestTopic] = field(default_factory=dict)
    _paused: bool = False
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    """What tells this gateway's pulses from those of others."""
    _pulsed: float = -math.inf
    """When the newest pulse was sent whose batch has been committed."""
    _clones: set[str] = field(default_factory=set)
    """Devices found to be two, to be barred once the batch that found it has been committed."""
    _in_flight: dict[str, int] = field(default_factory=dict)
    """Shadow requests that have come and are not answered yet, by device."""

    def receive(self, topic: str, payload: bytes, retained: bool, duplicate: bool, receipt: Receipt) -> None:
        """The handler of every message, which keeps it for its batch."""
        if retained:
            RETAINED.inc()
            self.connection.acknowledge([receipt])
            return
        parsed = self._parse_topic(topic)
        said = _NO_TOPIC if parsed is None else _judge(parsed, payload)
        if duplicate and isinstance(said, Request):
            said.duplicate = True
        if not self.waiting:
            self._first_at = time.monotonic()
        inbound = Inbound(parsed, topic, payload, said, receipt)
        if parsed is not None and parsed.verb in SHADOW_VERBS:
            self._count_in(inbound, parsed.thing, duplicate)
        self.waiting.append(inbound)
        self._arrived.set()
        if len(self.waiting) >= self.settings.gateway_queue_messages:
            self.connection.pause(True)  # each time: after a reconnection it is another link, which reads
            if not self._paused:
                self._paused = True
                log.warning("queue full, reading stopped", waiting=len(self.waiting))

    def _parse_topic(self, topic: str) -> RequestTopic | None:
        if (known := self._topics.get(topic)) is not None:
            return known
        parsed = parse_request_topic(topic)
        if parsed is not None and parsed.verb is Verb.HEARTBEAT:
            if len(self._topics) >= MAX_TOPICS:
                self._topics.clear()
            self._topics[topic] = parsed
        return parsed

    def _count_in(self, inbound: Inbound, thing: str, duplicate: bool) -> None:
        """What comes again has been let in before: it may have been applied, and a rejection would deny that."""
        number = self._in_flight.get(thing, 0)
        inbound.throttled = number >= MAX_IN_FLIGHT and not duplicate
        if not inbound.throttled:
            inbound.counted = True
            self._in_flight[thing] = number + 1

    def _count_out(self, inbound: Inbound) -> None:
        assert inbound.topic is not None
        inbound.counted, thing = False, inbound.topic.thing
        self._in_flight[thing] -= 1
        if not self._in_flight[thing]:
            del self._in_flight[thing]

    async def run(self, stop: asyncio.Event) -> None:
        """Handle batches until `stop` is set and nothing waits.

        A batch gathers messages for a moment from its first one on. What has come while the last batch was at work has
        waited already, so the busier the gateway is the larger are its batches, and it never rests between them.
        """
        pause = self.settings.gateway_batch_milliseconds / 1000
        while not (stop.is_set() and not self.waiting):
            if stop.is_set():
                self.connection.pause(True)  # what has not been read yet comes again to the next gateway
            if not self.waiting:
                self._arrived.clear()
                await _first(self._arrived, stop)
                continue
            if len(self.waiting) < self.settings.gateway_batch_messages and not stop.is_set():
                await asyncio.sleep(max(0.0, self._first_at + pause - time.monotonic()))
            batch = self.waiting[: self.settings.gateway_batch_messages]
            del self.waiting[: len(batch)]
            self._first_at = time.monotonic()
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
                    try:
                        outgoing = await self._give_up_on(batch[0], error)
                        break
                    except _AWAY:  # the message is looked at anew: it may be usable, too
                        RETRIES.inc()
                        await asyncio.sleep(RETRY_SECONDS)
                        continue
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
            if inbound.counted:
                self._count_out(inbound)
        self.connection.acknowledge(inbound.receipt for inbound in batch)
        await self._bar_clones()

    async def _bar_clones(self) -> None:
        """Bar what a batch found to be two. What fails here is found again with the next heartbeats."""
        while self._clones:
            thing = self._clones.pop()
            try:
                async with self.db.pool.connection() as connection:
                    reason = await bar_clone(connection, thing)
            except _AWAY as error:
                log.warning("cannot bar a cloned device yet", device=thing, error=str(error).strip()[:200])
                continue
            if reason is not None:
                CLONES.inc()
                log.warning("device barred", device=thing, reason=reason)

    async def _give_up_on(self, inbound: Inbound, error: Exception) -> list[Outgoing]:
        message = "the request could not be handled; it has been kept"
        bad = BadRequest(ErrorCode.INTERNAL_ERROR, message, inbound.said.token, shadow_code=500)
        thing = inbound.topic.thing if inbound.topic else None
        async with self.db.pool.connection() as connection:
            await share_access(connection)
            standing = await read_standing(await ask_standing(connection, [thing] if thing else []))
            if thing in standing.barred:
                BARRED.inc()
                return []
            QUARANTINED.labels(bad.code.value).inc()
            kept = [(inbound.raw_topic, thing, inbound.payload, bad.code.value, repr(error)[:300].replace("\x00", ""))]
            await save_quarantined(connection, kept)
        return _reject(inbound.topic, bad, time.time()) if inbound.topic else []

    async def _transact(self, inbounds: Sequence[Inbound]) -> list[Outgoing]:
        """One transaction over a batch. Returns what to publish once it has committed."""
        read = read_batch(inbounds)
        asked_of = read.things | {i.topic.thing for i, _ in (*read.bad, *read.throttled) if i.topic}
        outgoing: list[Outgoing] = []
        async with self.db.pool.connection() as connection, connection.pipeline():
            await share_access(connection)
            asked = await ask_standing(connection, list(asked_of))
            batch = await self._load(connection, read.jobs) if read.jobs else None
            standing = await read_standing(asked)
            if standing.barred:
                BARRED.inc(
                    sum(inbound.topic is not None and inbound.topic.thing in standing.barred for inbound in inbounds)
                )
                read = read.without(standing.barred)
            if batch is not None:
                await self.documents.ensure(connection, list(batch.ledger.jobs))
                for request in read.jobs:
                    outgoing += answer(request, batch.ledger, self.documents, batch.now)
                await save_in_pipeline(batch)
            if read.configs:
                outgoing += await self._configure(connection, read.configs, standing.now)
            if read.shadows:
                outgoing += await answer_about_shadows(connection, read.shadows, standing.now)
            if read.diagnostics:
                await take_diagnostics(connection, read.diagnostics)
            if read.commands:
                outgoing += await answer_about_commands(connection, read.commands, self.documents, standing.now)
            pulsed = await self._save_rest(connection, read, standing)
            await connection.commit()  # in the pipeline, with the last statements: it fails where one of them has
        self._pulsed = max(self._pulsed, pulsed)
        if batch is not None:
            self._log_trips(batch)
        now = time.time()
        for inbound, reason in read.bad:
            QUARANTINED.labels(reason.code.value).inc()
            if inbound.topic is not None:
                outgoing += _reject(inbound.topic, reason, now)
        THROTTLED.inc(len(read.throttled))
        for inbound, reason in read.throttled:
            if inbound.topic is not None:
                outgoing += reject_shadow(inbound.topic, reason, now)
        return outgoing

    async def _load(self, connection: psycopg.AsyncConnection, requests: Sequence[Request]) -> Batch:
        things = list({request.topic.thing for request in requests})
        pairs = list({(r.topic.job_id, r.topic.thing) for r in requests if r.topic.job_id})
        return await load_in_pipeline(connection, things, pairs, ())

    async def _configure(
        self, connection: psycopg.AsyncConnection, requests: Sequence[Request], now: float
    ) -> list[Outgoing]:
        reports = [(request.topic.thing, request.config.version) for request in requests if request.config is not None]
        configs = await load_configurations(connection, {request.topic.thing for request in requests}, reports)
        outgoing: list[Outgoing] = []
        for request in requests:
            outgoing += answer_config(request, configs.get(request.topic.thing), now)
        await save_configurations(connection, configs.values())
        return outgoing

    async def _save_rest(self, connection: psycopg.AsyncConnection, read: Read, standing: Standing) -> float:
        """What nobody is answered; when the newest pulse was sent that has been noted."""
        if standing.awaited:
            await happened(connection, _awaited(standing, read.things, set(read.beats.things)))
        if read.bad:
            await save_quarantined(
                connection,
                [
                    (
                        inbound.raw_topic,
                        (inbound.topic.thing or None) if inbound.topic else None,
                        inbound.payload,
                        reason.code.value,
                        reason.message.replace("\x00", "\\0"),
                    )
                    for inbound, reason in read.bad
                ],
            )
        pulsed = self._pulsed
        if read.pulses:
            pulsed = await note_pulses(connection, read.pulses, self.name, standing.now, pulsed)
        if read.beats.said:
            saved = await save_heartbeats(connection, read.beats.said)
            self._clones.update(saved.clones)
            await self.judge.refresh(connection)
            fresh = read.beats.said
            if saved.repeated:
                fresh = [beat for beat in fresh if (beat.device_id, beat.beat_no) not in saved.repeated]
            await self.judge.judge(connection, fresh, standing.watched, standing.now)
        return pulsed

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


def _judge(topic: RequestTopic, payload: bytes) -> Request | BadRequest:
    """What a message says. A defect that one of them meets must not leave it with the broker for ever."""
    try:
        return parse_request(topic, payload)
    except Exception as error:
        log.exception("message cannot be read", verb=topic.verb, thing=topic.thing)
        return BadRequest(ErrorCode.INTERNAL_ERROR, f"the request could not be read: {error!r}"[:300], shadow_code=500)


def _reject(topic: RequestTopic, bad: BadRequest, now: float) -> list[Outgoing]:
    """The answer to what is no request. Heartbeats and what is said about commands have none."""
    if topic.verb in CONFIG_VERBS:
        return reject_config(topic, bad, now)
    if topic.verb in SHADOW_VERBS:
        return reject_shadow(topic, bad, now)
    return [] if topic.verb in _NOT_OF_JOBS else reject(topic, bad, now)


def _awaited(
    standing: Standing, things: set[str], beating: set[str]
) -> Iterable[tuple[str, DeviceHappening, dict[str, str]]]:
    """What workflows wait for, of what has just happened."""
    for thing, happening in standing.awaited:
        if thing in (beating if happening is DeviceHappening.HEARTBEAT else things):
            yield thing, happening, {}


async def _first(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
