"""What is said about a shadow: the bodies of its answers and announcements, as AWS IoT's SDKs read them. Pure.

An update is announced in the order delta, documents, accepted: a device that has its answer looks no further.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from domain.shadow import Document, metadata_for, metadata_of
from models.protocol import shadow_topic

Message = tuple[str, bytes]


def announce(
    device_id: str,
    name: str,
    before: Document,
    after: Document,
    patch: Mapping[str, Any],
    now: float,
    token: str | None = None,
) -> list[Message]:
    """What is published for an accepted update: the delta while there is one, both documents, the answer."""

    def message(kind: str, body: dict[str, Any]) -> Message:
        return shadow_topic(device_id, name, "update", kind), signed_off(body, now, token)

    messages = []
    if (delta := delta_body(after)) is not None:
        messages.append(message("delta", delta))
    messages.append(message("documents", {"previous": _whole(before), "current": _whole(after)}))
    messages.append(message("accepted", accepted_body(patch, after.version, now)))
    return messages


def delta_body(document: Document) -> dict[str, Any] | None:
    """What differs, and since when it is wanted; None where nothing does."""
    delta = document.delta()
    if not delta:
        return None
    metadata = metadata_for(delta, document.desired_metadata or {})
    return {"version": document.version, "state": delta, "metadata": metadata}


def delta_message(device_id: str, name: str, document: Document, now: float) -> Message | None:
    """The delta alone, as a reminder; None where nothing differs."""
    body = delta_body(document)
    return None if body is None else (shadow_topic(device_id, name, "update", "delta"), signed_off(body, now, None))


def delete_message(device_id: str, name: str, before: Document, now: float) -> Message:
    """What is published when a shadow was deleted by somebody else than its device."""
    return shadow_topic(device_id, name, "delete", "accepted"), signed_off({"version": before.version}, now, None)


def accepted_body(patch: Mapping[str, Any], version: int, now: float) -> dict[str, Any]:
    """The answer to an update: the sections that were sent, with metadata of the leaves that they set."""
    metadata = {name: metadata_of(part, int(now)) for name, part in patch.items() if part is not None}
    return {"state": dict(patch), "metadata": metadata, "version": version}


def get_body(document: Document) -> dict[str, Any]:
    """The answer to `get`."""
    state = document.state()
    if delta := document.delta():
        state["delta"] = delta
    return {"state": state, "metadata": document.metadata(), "version": document.version}


def signed_off(body: dict[str, Any], now: float, token: str | None) -> bytes:
    """The body with its time, and with the token of the request that it answers."""
    body["timestamp"] = int(now)
    if token is not None:
        body["clientToken"] = token
    return orjson.dumps(body)


def _whole(document: Document) -> dict[str, Any]:
    return {"state": document.state(), "metadata": document.metadata(), "version": document.version}
