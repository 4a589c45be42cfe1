"""Shadows: what a device asks of them, and what is answered. Answers are published once the batch has been committed."""

from collections.abc import Sequence

import orjson
from psycopg import AsyncConnection

from gateway.jobs import Outgoing
from gateway.requests import BadRequest, Request
from models.protocol import RequestTopic, shadow_topic


async def answer_about_shadows(connection: AsyncConnection, requests: Sequence[Request], now: float) -> list[Outgoing]:
    """Do what is asked, in its order, and return what is to be published."""
    return []


def reject_shadow(topic: RequestTopic, bad: BadRequest, now: float) -> list[Outgoing]:
    """The answer to what is no request to a shadow."""
    verb = topic.verb.value.removeprefix("shadow-")
    body = {"code": bad.shadow_code, "message": bad.message, "timestamp": int(now)}
    if bad.token is not None:
        body["clientToken"] = bad.token
    return [(shadow_topic(topic.thing, topic.shadow, verb, "rejected"), orjson.dumps(body))]
