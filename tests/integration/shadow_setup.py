"""A gateway with a client that hears all that is said about shadows, and asks for any device."""

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson

from models.protocol import shadow_topic
from store.engine import Database
from tests.conftest import Broker
from tests.integration.rollout_setup import prepare
from tests.integration.test_gateway_jobs import Door, open_door

ANSWERS = ("accepted", "rejected")


@asynccontextmanager
async def shadow_door(db: Database, broker: Broker, devices: int = 3) -> AsyncIterator[Door]:
    """Devices motor-1 ..., a gateway, and a client that has subscribed to every shadow's answers."""
    fleet = await prepare(db, devices)
    async with open_door(db, broker, fleet, f"gateway-shadow-{time.monotonic_ns()}") as door:
        for name in ("", "+"):
            for verb in ("get", "update", "delete"):
                for ending in ANSWERS:
                    await door.client.subscribe(shadow_topic("+", name, verb, ending), qos=0)
            for ending in ("delta", "documents"):
                await door.client.subscribe(shadow_topic("+", name, "update", ending), qos=0)
        yield door


async def send(door: Door, thing: str, verb: str, body: Any = None, name: str = "", token: str = "") -> str:
    """Publish a request; its token."""
    token = token or f"t{random.getrandbits(60)}"
    payload = body if isinstance(body, bytes) else orjson.dumps({**(body or {}), "clientToken": token})
    await door.client.publish(shadow_topic(thing, name, verb), payload, qos=1)
    return token


async def ask(
    door: Door, thing: str, verb: str, body: Any = None, *, name: str = "", token: str = ""
) -> dict[str, Any]:
    """Publish a request; its answer, accepted or rejected."""
    token = await send(door, thing, verb, body, name, token)
    return await door.wait_for(thing, "ed", token)


async def desire(door: Door, thing: str, desired: Any, **more: Any) -> dict[str, Any]:
    """Update the desired section."""
    name = more.pop("name", "")
    return await ask(door, thing, "update", {"state": {"desired": desired}, **more}, name=name)


async def report(door: Door, thing: str, reported: Any, **more: Any) -> dict[str, Any]:
    """Update the reported section."""
    name = more.pop("name", "")
    return await ask(door, thing, "update", {"state": {"reported": reported}, **more}, name=name)


def heard(door: Door, thing: str, token: str) -> list[str]:
    """The kinds of messages that carry a token, in their order."""
    return [topic.rpartition("/")[2] for topic, body in door.answers.get(thing, []) if body.get("clientToken") == token]


async def rows(db: Database, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
    """What a statement finds."""
    async with db.pool.connection() as connection:
        return list(await (await connection.execute(sql.encode(), arguments)).fetchall())
