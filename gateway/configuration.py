"""The configuration's shadow: what a device asks of it or reports to it, and what is answered. Pure.

A subset of AWS IoT's named shadows (docs/adr/0016): `get`, and `update` of the reported section, which replaces it whole.
Answers are built while the batch's configurations are at hand and published only after they have been committed, in the
order delta, documents, accepted.
"""

from typing import Any

import orjson

from domain.configurations import DeviceConfig, delta_message
from domain.shadow import metadata_of
from gateway.jobs import Outgoing
from gateway.requests import BadRequest, Request
from models.protocol import CONFIG_SHADOW, RequestTopic, Verb, config_topic


def answer_config(request: Request, config: DeviceConfig | None, now: float) -> list[Outgoing]:
    """Do what is asked of `config` (None: the device is not in the registry), and return what is to be published."""
    topic, token = request.topic, request.token
    if topic.verb is Verb.CONFIG_GET:
        if config is None or not config.exists:
            return [_rejection(topic, token, 404, f"No shadow exists with name: {topic.thing}~{CONFIG_SHADOW}", now)]
        return [_accepted(topic, token, _document(config), now)]
    if config is None:
        return [_rejection(topic, token, 404, f"{topic.thing} is not in the registry", now)]
    if request.document_version is not None and request.document_version != config.document_version:
        message = f"Version conflict: expected {request.document_version}, it is {config.document_version}"
        return [_rejection(topic, token, 409, message, now)]
    report = request.config
    assert report is not None
    before = _document(config, delta=False)
    config.report(report, now)
    messages: list[Outgoing] = []
    if (delta := delta_message(config, now, token)) is not None:
        messages.append((config_topic(topic.thing, "update", "delta"), orjson.dumps(delta)))
    documents = _signed_off({"previous": before, "current": _document(config, delta=False)}, token, now)
    messages.append((config_topic(topic.thing, "update", "documents"), orjson.dumps(documents)))
    sent: dict[str, Any] = {"version": report.version}
    if report.config is not None:
        sent["config"] = report.config
    body = {
        "state": {"reported": sent},
        "metadata": {"reported": metadata_of(sent, int(now))},
        "version": config.document_version,
    }
    return [*messages, _accepted(topic, token, body, now)]


def reject_config(topic: RequestTopic, bad: BadRequest, now: float) -> list[Outgoing]:
    """The answer to what is no request to the shadow."""
    return [_rejection(topic, bad.token, bad.shadow_code, bad.message, now)]


def _document(config: DeviceConfig, delta: bool = True) -> dict[str, Any]:
    state: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    if config.desired_version > 0:
        state["desired"] = {"version": config.desired_version, "config": config.desired or {}}
        metadata["desired"] = metadata_of(state["desired"], int(config.desired_at or 0))
    if config.reported_at is not None:
        state["reported"] = {"version": config.reported_version, "config": config.reported}
        metadata["reported"] = metadata_of(state["reported"], int(config.reported_at))
    if delta and (differing := config.delta()):
        state["delta"] = differing
    return {"state": state, "metadata": metadata, "version": config.document_version}


def _request_topic(topic: RequestTopic, ending: str) -> str:
    return config_topic(topic.thing, "get" if topic.verb is Verb.CONFIG_GET else "update", ending)


def _accepted(topic: RequestTopic, token: str | None, body: dict[str, Any], now: float) -> Outgoing:
    return _request_topic(topic, "accepted"), orjson.dumps(_signed_off(body, token, now))


def _rejection(topic: RequestTopic, token: str | None, code: int, message: str, now: float) -> Outgoing:
    body = {"code": code, "message": message}
    return _request_topic(topic, "rejected"), orjson.dumps(_signed_off(body, token, now))


def _signed_off(body: dict[str, Any], token: str | None, now: float) -> dict[str, Any]:
    body["timestamp"] = int(now)
    if token is not None:
        body["clientToken"] = token
    return body
