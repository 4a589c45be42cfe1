"""From the body of a shadow request to what is asked, or to the reason why it is none. Pure.

Messages are AWS IoT's where it has one, with what was expected behind them. What can be judged only with the shadow at
hand (version, size, keys, depth after the merge) is domain/shadow.py's.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from domain.shadow import SECTIONS
from models.protocol import CONFIG_SHADOW, MAX_CLIENT_TOKEN_BYTES, RequestTopic, Verb

MAX_VERSION = 2**53
MAX_SEARCHED_BYTES = 256 * 1024
"""Of a message that is too large to be used, its token is still looked for up to here: its rejection carries it."""


@dataclass(frozen=True, slots=True)
class ShadowRequest:
    """What a device asks of a shadow. `patch`: the sections of an update; `version`: the one that it expects.

    `digest` names an update that says itself which one it is, by a token or a version: a broker may deliver it twice.
    """

    patch: Mapping[str, Any] | None = None
    version: int | None = None
    digest: str | None = None


class ShadowError(ValueError):
    """Why a request is rejected, with the code that the rejection carries."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def parse_shadow(topic: RequestTopic, body: dict[str, Any], payload: bytes = b"") -> ShadowRequest:
    """Judge the body of a request. Raises ShadowError."""
    if topic.shadow == CONFIG_SHADOW:  # only what is not get or update comes here
        raise ShadowError(403, "Forbidden: the shadow config is the server's; a device updates its reported section")
    if topic.verb is Verb.SHADOW_GET:
        return ShadowRequest()
    version = _version(body)
    if topic.verb is Verb.SHADOW_DELETE:
        return ShadowRequest(version=version)
    patch = _patch(body)
    named = version is not None or "clientToken" in body
    return ShadowRequest(patch, version, hashlib.blake2b(payload, digest_size=12).hexdigest() if named else None)


def refuse_shadow(payload: bytes) -> tuple[int, str]:
    """Code and message for what is no JSON."""
    try:
        payload.decode()
    except UnicodeDecodeError as error:
        return 415, f"Unsupported documented encoding; supported encoding is UTF-8: byte {error.start} is not"
    return 400, "Invalid JSON"


def token_of(payload: bytes) -> str | None:
    """The client token of a message that is rejected for another reason than its content; None where there is none."""
    if not payload or len(payload) > MAX_SEARCHED_BYTES:
        return None
    try:
        body = orjson.loads(payload)
    except orjson.JSONDecodeError:
        return None
    token = body.get("clientToken") if isinstance(body, dict) else None
    return token if isinstance(token, str) and len(token.encode()) <= MAX_CLIENT_TOKEN_BYTES else None


def _version(body: dict[str, Any]) -> int | None:
    version = body.get("version")
    if version is None:
        return None
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= MAX_VERSION:
        raise ShadowError(400, f"Invalid version: expected an integer from 0, got {version!r:.40}")
    return version


def _patch(body: dict[str, Any]) -> dict[str, Any]:
    if "state" not in body:
        raise ShadowError(400, "Missing required node: state")
    state = body["state"]
    if not isinstance(state, dict):
        raise ShadowError(400, f"State node must be an object, got {type(state).__name__}")
    if unknown := state.keys() - set(SECTIONS):
        raise ShadowError(400, f"State contains an invalid node: {min(unknown)!r:.60}; expected desired and reported")
    if not state:
        raise ShadowError(400, "State contains an invalid node: expected desired, reported or both, got neither")
    for name, section in state.items():
        if section is not None and not isinstance(section, dict):
            raise ShadowError(400, f"{name.capitalize()} node must be an object, got {type(section).__name__}")
        if _has_null_in_array(section):
            raise ShadowError(
                400, f"State contains an invalid node: null inside an array of {name}, which deletes nothing"
            )
    return state


def _has_null_in_array(value: Any, in_array: bool = False) -> bool:
    if isinstance(value, dict):
        return any(_has_null_in_array(inner, in_array) for inner in value.values())
    if isinstance(value, list):
        return any(_has_null_in_array(inner, True) for inner in value)
    return in_array and value is None
