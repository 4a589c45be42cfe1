"""5,000 updates by 50 writers on 10 shadows, through a real broker and the gateway: judged in PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiomqtt
import orjson
import pytest

from models.protocol import shadow_topic
from store.engine import Database
from tests.conftest import Broker
from tests.integration.rollout_setup import prepare
from tests.integration.shadow_setup import rows
from tests.integration.test_gateway_jobs import open_door

THINGS, WRITERS, UPDATES = 10, 5, 100


@dataclass
class Thing:
    """One connection, which several writers of one shadow share."""

    name: str
    client: aiomqtt.Client
    waiting: dict[str, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
    """By writer, when its last update was accepted, as the answer says."""
    conflicts: int = 0

    async def listen(self) -> None:
        async for message in self.client.messages:
            assert isinstance(message.payload, bytes)
            body = orjson.loads(message.payload)
            self.waiting.pop(body["clientToken"]).set_result(body)

    async def ask(self, verb: str, token: str, **body: Any) -> dict[str, Any]:
        answer = self.waiting[token] = asyncio.get_running_loop().create_future()
        payload = orjson.dumps({**body, "clientToken": token})
        await self.client.publish(shadow_topic(self.name, "", verb), payload, qos=1)
        return await asyncio.wait_for(answer, 60)

    async def write_blindly(self, writer: str) -> None:
        """Each writer has a key of its own."""
        for number in range(1, UPDATES + 1):
            answer = await self.ask("update", f"{writer}-{number}", state={"reported": {writer: {"n": [number]}}})
            assert "code" not in answer, answer
            self.last[writer] = answer["timestamp"]

    async def write_by_version(self, writer: str) -> None:
        """All writers count up the same number: read, add one, write if nobody else has; else again."""
        got = await self.ask("get", f"{writer}-first")
        version, count, tries = got.get("version", 0), _count(got), 0
        for number in range(1, UPDATES + 1):
            while True:
                tries += 1
                state = {"reported": {"count": count + 1, writer: {"n": [number]}}}
                answer = await self.ask("update", f"{writer}-{tries}", state=state, version=version)
                if answer.get("code") != 409:
                    break
                self.conflicts += 1
                got = await self.ask("get", f"{writer}-get-{tries}")
                version, count = got["version"], _count(got)
            assert "code" not in answer, answer
            assert answer["version"] == version + 1
            version, count, self.last[writer] = version + 1, count + 1, answer["timestamp"]


def _count(got: dict[str, Any]) -> int:
    return int(got.get("state", {}).get("reported", {}).get("count", 0))


@asynccontextmanager
async def things(db: Database, broker: Broker) -> AsyncIterator[list[Thing]]:
    """A gateway, and one connection for each of ten devices."""
    fleet = await prepare(db, THINGS)
    async with open_door(db, broker, fleet, "gateway-writers"), AsyncExitStack() as stack:
        made, listening = [], []
        for number in range(1, THINGS + 1):
            client = await stack.enter_async_context(aiomqtt.Client(broker.host, broker.port))
            thing = Thing(f"motor-{number}", client)
            for verb in ("get", "update"):
                for ending in ("accepted", "rejected"):
                    await client.subscribe(shadow_topic(thing.name, "", verb, ending), qos=1)
            listening.append(asyncio.create_task(thing.listen()))
            made.append(thing)
        yield made
        for task in listening:
            task.cancel()


async def assert_nothing_is_lost(db: Database, all_things: list[Thing], count: int | None) -> None:
    """Versions without a gap, each writer's last word, and when it was said."""
    total = WRITERS * UPDATES
    shadows = await rows(db, "SELECT device_id, version, reported, reported_metadata, desired FROM shadows")
    by_thing = {thing.name: thing for thing in all_things}
    assert len(shadows) == THINGS
    for device, version, reported, metadata, desired in shadows:
        assert (version, desired) == (total, None)
        writers = by_thing[device].last
        counted = {} if count is None else {"count": count}
        assert reported == {**counted, **{writer: {"n": [UPDATES]} for writer in writers}} and len(writers) == WRITERS
        newest = {} if count is None else {"count": {"timestamp": max(writers.values())}}
        assert metadata == {**newest, **{writer: {"n": [{"timestamp": at}]} for writer, at in writers.items()}}
    history = await rows(
        db,
        "SELECT device_id, count(*), count(DISTINCT version), min(version), max(version) FROM shadow_history GROUP BY 1",
    )
    assert sorted(history) == sorted((thing, total, total, 1, total) for thing in by_thing)
    said = await rows(
        db,
        "SELECT count(DISTINCT (device_id, key, value)) FROM shadow_history, jsonb_each(change->'reported') "
        "WHERE key <> 'count'",
    )
    assert said == [(THINGS * total,)], "every update of every writer is in the history, once"


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_5000_updates_of_50_writers_leave_no_gap_and_lose_nothing(db: Database, broker: Broker) -> None:
    async with things(db, broker) as all_things:
        async with asyncio.TaskGroup() as group:
            for thing in all_things:
                for writer in range(WRITERS):
                    group.create_task(thing.write_blindly(f"w{writer}"))
        await assert_nothing_is_lost(db, all_things, None)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_5000_versioned_updates_of_50_writers_count_exactly(db: Database, broker: Broker) -> None:
    async with things(db, broker) as all_things:
        async with asyncio.TaskGroup() as group:
            for thing in all_things:
                for writer in range(WRITERS):
                    group.create_task(thing.write_by_version(f"w{writer}"))
        await assert_nothing_is_lost(db, all_things, WRITERS * UPDATES)
        assert sum(thing.conflicts for thing in all_things) > 1000, "writers that never met would prove nothing"
