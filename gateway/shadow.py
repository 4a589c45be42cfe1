"""Shadows: what a device asks of them, and what is answered. Answers are published once the batch has been committed.

The shadows of a batch are loaded and locked at once, changed in memory in the order of the requests, and saved at once.
An update that the broker delivers again, because nobody acknowledged it in time, is known by its digest: it is answered
as accepted, and not applied a second time. Where one that cannot be known, or a deletion, is done a second time, so is
what has followed it: it comes again, too, and skipping it would leave the shadow as it was before.
"""

from collections.abc import Sequence

from prometheus_client import Counter
from psycopg import AsyncConnection

from domain.shadow import ShadowRefusedError
from domain.shadow_messages import accepted_body, announce, get_body, signed_off
from gateway.jobs import Outgoing
from gateway.requests import BadRequest, Request
from models.protocol import RequestTopic, Verb, shadow_topic
from store.shadows import LoadedShadow, load_shadows, save_shadows

MAX_IN_FLIGHT = 10
"""Shadow requests of one device that have come and are not answered yet; a further one is rejected."""
TOO_MANY = (
    f"Too many requests: {MAX_IN_FLIGHT} requests of this device wait for their answers; wait for them, then ask again"
)
SHADOWS = Counter(
    "tidegate_gateway_shadow_requests_total",
    "Requests to shadows, by what became of them; repeated: delivered again by the broker, not applied again.",
    ["what"],
)


async def answer_about_shadows(connection: AsyncConnection, requests: Sequence[Request], now: float) -> list[Outgoing]:
    """Do what is asked, in its order, and return what is to be published."""
    changing = any(request.topic.verb is not Verb.SHADOW_GET for request in requests)
    keys = {(request.topic.thing, request.topic.shadow) for request in requests}
    shadows = await load_shadows(connection, keys, lock=changing)
    outgoing: list[Outgoing] = []
    for request in requests:
        outgoing += _answer(request, shadows.get((request.topic.thing, request.topic.shadow)), now)
    if changing:
        await save_shadows(connection, shadows.values(), now)
    return outgoing


def reject_shadow(topic: RequestTopic, bad: BadRequest, now: float) -> list[Outgoing]:
    """The answer to what is no request to a shadow."""
    return [_rejection(topic, bad.token, bad.shadow_code, bad.message, now)]


def _answer(request: Request, shadow: LoadedShadow | None, now: float) -> list[Outgoing]:
    topic, token, asked = request.topic, request.token, request.shadow
    assert asked is not None
    if shadow is None:
        return [_rejection(topic, token, 404, "Thing not found", now)]
    before = shadow.document
    try:
        if topic.verb is Verb.SHADOW_UPDATE:
            assert asked.patch is not None
            if request.duplicate and asked.digest is not None and asked.digest in shadow.recent:
                SHADOWS.labels("repeated").inc()
                body = accepted_body(asked.patch, before.version, now)
                return [(shadow_topic(topic.thing, topic.shadow, "update", "accepted"), signed_off(body, now, token))]
            shadow.update(
                asked.patch, now, f"device:{topic.thing}", asked.version, asked.digest, again=request.duplicate
            )
            SHADOWS.labels("updated").inc()
            return announce(topic.thing, topic.shadow, before, shadow.document, asked.patch, now, token)
        if not before.exists:
            return [_rejection(topic, token, 404, _missing(topic), now)]
        if topic.verb is Verb.SHADOW_DELETE:
            shadow.delete(f"device:{topic.thing}", asked.version)
            shadow.recent = []
            SHADOWS.labels("deleted").inc()
            return [_accepted(topic, {"version": before.version}, now, token)]
        SHADOWS.labels("read").inc()
        return [_accepted(topic, get_body(before), now, token)]
    except ShadowRefusedError as refused:
        return [_rejection(topic, token, refused.code, str(refused), now)]


def _missing(topic: RequestTopic) -> str:
    return f"No shadow exists with name: {topic.thing}" + (f"~{topic.shadow}" if topic.shadow else "")


def _accepted(topic: RequestTopic, body: dict[str, object], now: float, token: str | None) -> Outgoing:
    return _answer_topic(topic, "accepted"), signed_off(body, now, token)


def _rejection(topic: RequestTopic, token: str | None, code: int, message: str, now: float) -> Outgoing:
    SHADOWS.labels("rejected").inc()
    return _answer_topic(topic, "rejected"), signed_off({"code": code, "message": message}, now, token)


def _answer_topic(topic: RequestTopic, ending: str) -> str:
    return shadow_topic(topic.thing, topic.shadow, topic.verb.value.removeprefix("shadow-"), ending)
